"""What layerkv uses of vLLM. Written by ``tools/vllm_uses.py --write``: change that, or what uses it.

NAMES: what is imported, by module. MEMBERS: what is read, set, called or overridden, by class. PARAMETERS:
what is passed, by function or class. OVERRIDES: what ours takes, by the method of vLLM's that it overrides,
in order; those only by name behind a star.
"""

NAMES: dict[str, str] = {
    "vllm": "__version__",
    "vllm.distributed.kv_events": "BlockRemoved BlockStored KVCacheEvent MEDIUM_CPU",
    "vllm.distributed.kv_transfer": "get_kv_transfer_group",
    "vllm.distributed.kv_transfer.kv_connector.factory": "KVConnectorFactory",
    "vllm.distributed.kv_transfer.kv_connector.v1.base": (
        "KVConnectorBase_V1 KVConnectorMetadata KVConnectorRole KVConnectorTransferResults KVConnectorWorkerMetadata "
        "SupportsHMA"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics": "KVConnectorPromMetrics KVConnectorStats",
    "vllm.engine.arg_utils": "EngineArgs",
    "vllm.exceptions": "GracefulHTTPError",
    "vllm.logger": "init_logger",
    "vllm.platforms": "current_platform",
    "vllm.sampling_params": "RequestOutputKind SamplingType",
    "vllm.usage.usage_lib": "UsageContext",
    "vllm.utils.math_utils": "cdiv",
    "vllm.v1.core.block_pool": "BlockPool",
    "vllm.v1.core.kv_cache_utils": (
        "KVCacheBlock generate_block_hash_extra_keys maybe_convert_block_hash resolve_kv_cache_block_sizes "
        "to_event_extra_keys"
    ),
    "vllm.v1.core.sched.async_scheduler": "AsyncScheduler",
    "vllm.v1.core.sched.interface": "PauseState",
    "vllm.v1.core.sched.request_queue": "RequestQueue SchedulingPolicy",
    "vllm.v1.core.sched.scheduler": "Scheduler",
    "vllm.v1.core.single_type_kv_cache_manager": (
        "ChunkedLocalAttentionManager FullAttentionManager SingleTypeKVCacheManager SlidingWindowManager"
    ),
    "vllm.v1.engine": "EngineCoreOutput EngineCoreOutputs",
    "vllm.v1.kv_cache_interface": (
        "AttentionSpec ChunkedLocalAttentionSpec FullAttentionSpec KVCacheGroupSpec KVCacheSpec MLAAttentionSpec "
        "MambaSpec SlidingWindowSpec UniformTypeKVCacheSpecs"
    ),
    "vllm.v1.kv_cache_spec_registry": "KVCacheSpecRegistry register_kv_cache_spec",
    "vllm.v1.metrics.stats": "PrefixCacheStats SchedulerStats",
    "vllm.v1.request": "Request RequestStatus",
    "vllm.v1.sample.logits_processor.interface": "LogitsProcessor",
    "vllm.v1.worker.cpu_worker": "CPUWorker",
    "vllm.v1.worker.gpu.sample.logits_processor.interface": "LogitsProcessor",
    "vllm.v1.worker.gpu_worker": "Worker",
}

MEMBERS: dict[str, str] = {
    "vllm.config.AuxOutputConfig": "enabled",
    "vllm.config.CacheConfig": (
        "block_size cache_dtype enable_prefix_caching kv_cache_dtype_skip_layers kv_cache_max_concurrency "
        "kv_cache_memory_bytes kv_cache_size_tokens kv_offloading_size mamba_cache_mode num_gpu_blocks_override "
        "user_specified_block_size"
    ),
    "vllm.config.CompilationConfig": "static_forward_context",
    "vllm.config.DeviceConfig": "device_type",
    "vllm.config.KVTransferConfig": "kv_connector kv_connector_extra_config kv_load_failure_policy kv_role",
    "vllm.config.LoRAConfig": "max_loras",
    "vllm.config.ModelConfig": (
        "enable_sleep_mode get_num_layers is_attention_free is_encoder_decoder is_mm_prefix_lm is_multimodal_model "
        "logits_processors max_model_len model multimodal_config original_max_model_len runner_type served_model_name"
    ),
    "vllm.config.ParallelConfig": (
        "_api_process_count data_parallel_backend data_parallel_index data_parallel_size data_parallel_size_local "
        "decode_context_parallel_size distributed_executor_backend enable_elastic_ep enable_fault_tolerance "
        "nnodes_within_dp pipeline_parallel_size prefill_context_parallel_size rank tensor_parallel_size use_ubatching "
        "worker_cls"
    ),
    "vllm.config.SchedulerConfig": (
        "async_scheduling disable_hybrid_kv_cache_manager enable_chunked_prefill long_prefill_token_threshold "
        "max_num_batched_tokens prefill_schedule_interval scheduler_cls watermark"
    ),
    "vllm.config.VllmConfig": (
        "aux_output_config cache_config compilation_config device_config diffusion_config ec_transfer_config "
        "kv_transfer_config max_in_flight_tokens model_config parallel_config scheduler_config speculative_config "
        "use_v2_model_runner"
    ),
    "vllm.distributed.kv_transfer.kv_connector.factory.KVConnectorFactory": "register_connector",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1": (
        "bind_connector_metadata bind_kv_cache_manager build_connector_meta build_connector_worker_meta "
        "build_kv_connector_stats build_prom_metrics get_block_ids_with_load_errors get_finished "
        "get_kv_connector_stats get_mem_pool_context get_num_new_matched_tokens get_transfer_results "
        "has_connector_metadata has_pending_push_work on_new_request register_kv_caches requires_kv_delivery "
        "requires_piecewise_for_cudagraph reset_cache save_kv_layer shutdown start_load_kv take_events "
        "update_connector_output update_state_after_alloc wait_for_layer_load wait_for_save"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorRole": "SCHEDULER",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorWorkerMetadata": "aggregate",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.SupportsHMA": "request_finished_all_groups",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorPromMetrics": "observe per_engine_labelvalues",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorStats": "aggregate data is_empty reduce reset",
    "vllm.engine.arg_utils.EngineArgs": "create_engine_config disable_log_stats kv_transfer_config",
    "vllm.lora.request.LoRARequest": "adapter_id lora_int_id name",
    "vllm.model_executor.layers.attention.attention.Attention": "kv_sharing_target_layer_name",
    "vllm.platforms.current_platform": "is_cpu",
    "vllm.sampling_params.RequestOutputKind": "DELTA FINAL_ONLY",
    "vllm.sampling_params.SamplingParams": "extra_args n output_kind sampling_type",
    "vllm.sampling_params.SamplingType": "RANDOM_SEED",
    "vllm.usage.usage_lib.UsageContext": "LLM_CLASS",
    "vllm.v1.core.block_pool.BlockPool": (
        "blocks evict_blocks free_block_queue free_blocks get_cached_block get_new_blocks get_num_free_blocks "
        "hash_block_size num_gpu_blocks"
    ),
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": "find_longest_cache_hit single_type_managers",
    "vllm.v1.core.kv_cache_manager.KVCacheBlocks": "get_block_ids",
    "vllm.v1.core.kv_cache_manager.KVCacheManager": (
        "block_pool coordinator enable_caching enable_kv_cache_events evict_blocks free get_block_ids "
        "kv_cache_event_metadata prefix_cache_lookup_enabled watermark_blocks"
    ),
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue": (
        "append append_n get_all_free_blocks num_free_blocks popleft popleft_n prepend_n remove"
    ),
    "vllm.v1.core.kv_cache_utils.KVCacheBlock": "block_hash block_id pool ref_cnt",
    "vllm.v1.core.sched.interface.PauseState": "PAUSED_ALL PAUSED_NEW UNPAUSED",
    "vllm.v1.core.sched.output.KVConnectorBlockState": "resolve_block_ids",
    "vllm.v1.core.sched.output.SchedulerOutput": (
        "kv_connector_block_state kv_connector_metadata num_scheduled_tokens scheduled_new_reqs "
        "total_num_scheduled_tokens"
    ),
    "vllm.v1.core.sched.request_queue.RequestQueue": (
        "add_request peek_request pop_request prepend_request prepend_requests remove_request remove_requests"
    ),
    "vllm.v1.core.sched.request_queue.SchedulingPolicy": "PRIORITY",
    "vllm.v1.core.sched.scheduler.Scheduler": (
        "_handle_blocked_waiting_request _inflight_prefill_reserved_blocks _inflight_prefills _preempt_request "
        "adaptive_long_prefill_threshold add_request cache_config connector current_step defer_block_free "
        "deferred_frees deferred_waiting failed_recving_kv_req_ids finish_requests finished_recving_kv_req_ids "
        "get_num_unfinished_requests kv_cache_manager kv_holding_waiting log_stats lora_config max_model_len "
        "max_num_active_reqs max_num_scheduled_tokens num_lookahead_tokens num_spec_tokens "
        "num_waiting_for_streaming_input pause_state policy prev_step_scheduled_req_ids processed_step_seq requests "
        "reset_connector_cache reset_preempted_req_ids reset_prefix_cache running sched_step_seq schedule "
        "scheduler_config set_pause_state shutdown update_from_output use_v2_model_runner vllm_config waiting"
    ),
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager": (
        "_get_num_evictable_blocks allocate_external_computed_blocks allocate_new_blocks block_pool block_size "
        "cache_blocks get_num_blocks_to_allocate kv_cache_group_id req_to_blocks"
    ),
    "vllm.v1.engine.EngineCoreOutput": "finish_reason new_token_ids request_id",
    "vllm.v1.engine.EngineCoreOutputs": "outputs scheduler_stats",
    "vllm.v1.kv_cache_interface.AttentionSpec": "block_size dtype kv_quant_mode page_size_bytes",
    "vllm.v1.kv_cache_interface.ChunkedLocalAttentionSpec": "attention_chunk_size",
    "vllm.v1.kv_cache_interface.FullAttentionSpec": "merge",
    "vllm.v1.kv_cache_interface.KVCacheConfig": "kv_cache_groups kv_cache_layout kv_cache_tensors num_blocks",
    "vllm.v1.kv_cache_interface.KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.kv_cache_interface.KVCacheTensor": "block_stride layer_stride layers offset",
    "vllm.v1.kv_cache_interface.MambaSpec": "num_speculative_blocks",
    "vllm.v1.kv_cache_interface.SlidingWindowSpec": "extra_retained_tokens sliding_window",
    "vllm.v1.kv_cache_interface.UniformTypeKVCacheSpecs": "is_uniform_type",
    "vllm.v1.kv_cache_spec_registry.KVCacheSpecRegistry": "_ensure_registered",
    "vllm.v1.metrics.stats.SchedulerStats": (
        "connector_prefix_cache_stats cudagraph_stats ec_connector_stats iteration_details kv_cache_eviction_events "
        "kv_connector_stats perf_stats prefix_cache_stats spec_decoding_stats"
    ),
    "vllm.v1.outputs.KVConnectorOutput": (
        "finished_recving invalid_block_ids kv_connector_stats kv_connector_worker_meta"
    ),
    "vllm.v1.outputs.ModelRunnerOutput": "kv_connector_output",
    "vllm.v1.request.Request": (
        "all_token_ids arrival_time block_hashes client_index drop_stale_output get_finished_reason is_finished "
        "is_prefill_chunk lora_request max_tokens mm_features num_computed_tokens num_in_flight_tokens "
        "num_output_placeholders num_output_tokens num_prompt_tokens num_stale_output_tokens num_tokens priority "
        "request_id resumable sampling_params session_id skip_reading_prefix_cache spec_token_ids status "
        "structured_output_request take_events trace_headers"
    ),
    "vllm.v1.request.RequestStatus": (
        "FINISHED_ABORTED FINISHED_ERROR FINISHED_LENGTH_CAPPED FINISHED_REPETITION FINISHED_STOPPED PREEMPTED RUNNING "
        "WAITING WAITING_FOR_REMOTE_KVS WAITING_FOR_STREAMING_REQ WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR"
    ),
    "vllm.v1.structured_output.request.StructuredOutputRequest": "grammar",
    "vllm.v1.worker.gpu_worker.Worker": (
        "compile_or_warm_up_model determine_available_memory execute_model get_kv_cache_spec init_device model_runner "
        "vllm_config"
    ),
}

PARAMETERS: dict[str, str] = {
    "vllm.config.ModelConfig.get_num_layers": "parallel_config",
    "vllm.distributed.kv_events.BlockRemoved": "block_hashes group_idx medium",
    "vllm.distributed.kv_events.BlockStored": (
        "block_hashes block_size extra_keys group_idx kv_cache_spec_kind kv_cache_spec_sliding_window lora_id "
        "lora_name medium parent_block_hash session_id token_ids"
    ),
    "vllm.distributed.kv_transfer.kv_connector.factory.KVConnectorFactory.register_connector": (
        "class_name module_path name"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.bind_connector_metadata": (
        "connector_metadata"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.bind_kv_cache_manager": "kv_cache_manager",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.build_connector_meta": "scheduler_output",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.build_kv_connector_stats": "data",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.build_prom_metrics": (
        "labelnames metric_types per_engine_labelvalues vllm_config"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_finished": "finished_req_ids",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_num_new_matched_tokens": (
        "num_computed_tokens request"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_transfer_results": "finished_req_ids",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.on_new_request": "request",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.register_kv_caches": "kv_caches",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.requires_piecewise_for_cudagraph": (
        "extra_config"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.save_kv_layer": (
        "attn_metadata kv_layer layer_name"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.start_load_kv": "forward_context",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.update_connector_output": "connector_output",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.update_state_after_alloc": (
        "blocks num_external_tokens request"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.wait_for_layer_load": "layer_name",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorTransferResults": "finished_recving",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorWorkerMetadata.aggregate": "other",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.SupportsHMA.request_finished_all_groups": "block_ids request",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorPromMetrics.observe": (
        "engine_idx transfer_stats_data"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorStats.aggregate": "other",
    "vllm.logger.init_logger": "name",
    "vllm.utils.math_utils.cdiv": "a b",
    "vllm.v1.core.block_pool.BlockPool.evict_blocks": "block_ids",
    "vllm.v1.core.block_pool.BlockPool.free_blocks": "ordered_blocks",
    "vllm.v1.core.block_pool.BlockPool.get_cached_block": "block_hash kv_cache_group_ids",
    "vllm.v1.core.block_pool.BlockPool.get_new_blocks": "num_blocks",
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.find_longest_cache_hit": "block_hashes max_cache_hit_length",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.evict_blocks": "block_ids",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.free": "request",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.get_block_ids": "request_id",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.prefix_cache_lookup_enabled": "request",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.append": "block",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.append_n": "blocks",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.popleft_n": "n",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.prepend_n": "blocks",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.remove": "block",
    "vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys": "end_token_idx request start_mm_idx start_token_idx",
    "vllm.v1.core.kv_cache_utils.maybe_convert_block_hash": "hash_bytes",
    "vllm.v1.core.kv_cache_utils.resolve_kv_cache_block_sizes": "kv_cache_config vllm_config",
    "vllm.v1.core.kv_cache_utils.to_event_extra_keys": "extra_keys",
    "vllm.v1.core.sched.request_queue.RequestQueue.add_request": "request",
    "vllm.v1.core.sched.request_queue.RequestQueue.prepend_request": "request",
    "vllm.v1.core.sched.request_queue.RequestQueue.prepend_requests": "requests",
    "vllm.v1.core.sched.request_queue.RequestQueue.remove_request": "request",
    "vllm.v1.core.sched.request_queue.RequestQueue.remove_requests": "requests",
    "vllm.v1.core.sched.scheduler.Scheduler._handle_blocked_waiting_request": "request",
    "vllm.v1.core.sched.scheduler.Scheduler._preempt_request": "drop_stale_output request timestamp",
    "vllm.v1.core.sched.scheduler.Scheduler.add_request": "request",
    "vllm.v1.core.sched.scheduler.Scheduler.finish_requests": "finished_status request_ids",
    "vllm.v1.core.sched.scheduler.Scheduler.reset_prefix_cache": "reset_connector reset_running_requests",
    "vllm.v1.core.sched.scheduler.Scheduler.schedule": "throttle_prefills",
    "vllm.v1.core.sched.scheduler.Scheduler.set_pause_state": "pause_state",
    "vllm.v1.core.sched.scheduler.Scheduler.update_from_output": "model_runner_output scheduler_output",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager._get_num_evictable_blocks": "blocks",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.allocate_external_computed_blocks": (
        "num_external_computed_tokens num_local_computed_tokens request_id"
    ),
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.allocate_new_blocks": (
        "num_tokens num_tokens_main_model request_id"
    ),
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.cache_blocks": "num_tokens request",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.get_num_blocks_to_allocate": (
        "new_computed_blocks num_tokens request_id"
    ),
    "vllm.v1.engine.EngineCoreOutput": "events finish_reason new_token_ids request_id stop_reason trace_headers",
    "vllm.v1.kv_cache_interface.FullAttentionSpec": "attention_chunk_size sliding_window",
    "vllm.v1.kv_cache_interface.FullAttentionSpec.merge": "specs",
    "vllm.v1.kv_cache_interface.UniformTypeKVCacheSpecs.is_uniform_type": "kv_cache_specs",
    "vllm.v1.kv_cache_spec_registry.register_kv_cache_spec": "manager_class uniform_type_base_spec",
    "vllm.v1.worker.gpu_worker.Worker.execute_model": "scheduler_output",
}

OVERRIDES: dict[str, str] = {
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.bind_connector_metadata": (
        "connector_metadata"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.bind_kv_cache_manager": "kv_cache_manager",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.build_connector_meta": "scheduler_output",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.build_connector_worker_meta": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.build_kv_connector_stats": "data",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.build_prom_metrics": (
        "vllm_config metric_types labelnames per_engine_labelvalues"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_block_ids_with_load_errors": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_finished": "finished_req_ids",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_kv_connector_stats": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_mem_pool_context": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_num_new_matched_tokens": (
        "request num_computed_tokens"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_transfer_results": "finished_req_ids",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.has_connector_metadata": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.has_pending_push_work": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.on_new_request": "request",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.register_kv_caches": "kv_caches",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.requires_piecewise_for_cudagraph": (
        "extra_config"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.reset_cache": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.save_kv_layer": (
        "layer_name kv_layer attn_metadata **kwargs"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.shutdown": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.start_load_kv": "forward_context **kwargs",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.take_events": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.update_connector_output": "connector_output",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.update_state_after_alloc": (
        "request blocks num_external_tokens"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.wait_for_layer_load": "layer_name",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.wait_for_save": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorWorkerMetadata.aggregate": "other",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.SupportsHMA.request_finished_all_groups": "request block_ids",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorPromMetrics.observe": (
        "transfer_stats_data engine_idx"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorStats.aggregate": "other",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorStats.is_empty": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorStats.reduce": "",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics.KVConnectorStats.reset": "",
    "vllm.v1.core.block_pool.BlockPool.free_blocks": "ordered_blocks",
    "vllm.v1.core.block_pool.BlockPool.get_new_blocks": "num_blocks",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.append": "block",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.append_n": "blocks",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.get_all_free_blocks": "",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.popleft": "",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.popleft_n": "n",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.prepend_n": "blocks",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.remove": "block",
    "vllm.v1.core.sched.request_queue.RequestQueue.add_request": "request",
    "vllm.v1.core.sched.request_queue.RequestQueue.peek_request": "",
    "vllm.v1.core.sched.request_queue.RequestQueue.pop_request": "",
    "vllm.v1.core.sched.request_queue.RequestQueue.prepend_request": "request",
    "vllm.v1.core.sched.request_queue.RequestQueue.prepend_requests": "requests",
    "vllm.v1.core.sched.request_queue.RequestQueue.remove_request": "request",
    "vllm.v1.core.sched.request_queue.RequestQueue.remove_requests": "requests",
    "vllm.v1.core.sched.scheduler.Scheduler._preempt_request": "request timestamp drop_stale_output",
    "vllm.v1.core.sched.scheduler.Scheduler.add_request": "request",
    "vllm.v1.core.sched.scheduler.Scheduler.finish_requests": "request_ids finished_status",
    "vllm.v1.core.sched.scheduler.Scheduler.get_num_unfinished_requests": "",
    "vllm.v1.core.sched.scheduler.Scheduler.reset_prefix_cache": "reset_running_requests reset_connector",
    "vllm.v1.core.sched.scheduler.Scheduler.schedule": "throttle_prefills",
    "vllm.v1.core.sched.scheduler.Scheduler.set_pause_state": "pause_state",
    "vllm.v1.core.sched.scheduler.Scheduler.shutdown": "",
    "vllm.v1.core.sched.scheduler.Scheduler.update_from_output": "scheduler_output model_runner_output",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.allocate_external_computed_blocks": (
        "request_id num_local_computed_tokens num_external_computed_tokens *args **kwargs"
    ),
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.allocate_new_blocks": (
        "request_id num_tokens num_tokens_main_model"
    ),
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.cache_blocks": (
        "request num_tokens *args **kwargs"
    ),
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.get_num_blocks_to_allocate": (
        "request_id num_tokens new_computed_blocks *args **kwargs"
    ),
    "vllm.v1.kv_cache_interface.FullAttentionSpec.merge": "specs",
    "vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model": "",
    "vllm.v1.worker.gpu_worker.Worker.determine_available_memory": "",
    "vllm.v1.worker.gpu_worker.Worker.execute_model": "scheduler_output",
    "vllm.v1.worker.gpu_worker.Worker.get_kv_cache_spec": "",
    "vllm.v1.worker.gpu_worker.Worker.init_device": "",
}
