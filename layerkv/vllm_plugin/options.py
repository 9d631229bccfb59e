"""What becomes of each of vLLM's options under layerkv: the table of decisions, as data.

An option that vLLM adds is decided about here first: a test compares this table with vLLM's own lists, and makes vLLM
refuse what stands here as refused. ``kv_transfer_config.x`` is the key ``x`` inside that option.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What layerkv makes of an option."""

    WORKS = "it does what it does in vLLM, with layerkv too"
    REFUSED = "another value than vLLM's default is refused at start, or some values are"
    OURS = "layerkv sets or reads it"
    APART = "it concerns a part of vLLM that layerkv does not touch"
    NO_MATTER = "it matters only to what is refused already"


@dataclass(frozen=True, slots=True)
class Decision:
    """The same decision about several options."""

    verdict: Verdict
    why: str
    options: tuple[str, ...]


def _decide(verdict: Verdict, why: str, options: str) -> Decision:
    return Decision(verdict, why, tuple(options.split()))


def _set(options: str) -> frozenset[str]:
    return frozenset(options.split())


DECISIONS: tuple[Decision, ...] = (
    # What layerkv is turned on by ------------------------------------------------------------------------------------
    _decide(Verdict.OURS, "the one flag", "kv_transfer_config kv_transfer_config.kv_connector"),
    _decide(Verdict.OURS, "layerkv's own settings, checked key by key", "kv_transfer_config.kv_connector_extra_config"),
    _decide(Verdict.OURS, "needed where vLLM loads no plugins", "kv_transfer_config.kv_connector_module_path"),
    _decide(
        Verdict.OURS,
        "always recompute: vLLM's default, fail, cannot be told from a wish; said at start",
        "kv_transfer_config.kv_load_failure_policy",
    ),
    _decide(Verdict.REFUSED, "one engine stores and loads: kv_both", "kv_transfer_config.kv_role"),
    _decide(
        Verdict.APART,
        "for connectors between engines",
        "kv_transfer_config.engine_id kv_transfer_config.kv_buffer_device kv_transfer_config.kv_port "
        "kv_transfer_config.kv_ip kv_transfer_config.kv_rank kv_transfer_config.kv_parallel_size "
        "kv_transfer_config.kv_buffer_size kv_transfer_config.enable_permute_local_kv",
    ),
    _decide(
        Verdict.REFUSED, "layerkv brings its own, but keeps a scheduler derived from it", "worker_cls scheduler_cls"
    ),
    _decide(Verdict.WORKS, "vLLM adds it to our worker", "worker_extension_cls"),
    _decide(Verdict.OURS, "the SLO gate is added behind the user's own", "logits_processors"),
    _decide(Verdict.WORKS, "the policy's Retry-After and smooth streams are some", "middleware"),
    # Who else moves KV -----------------------------------------------------------------------------------------------
    _decide(Verdict.REFUSED, "vLLM would put its connector in layerkv's place", "kv_offloading_size"),
    _decide(Verdict.NO_MATTER, "without kv_offloading_size nothing", "kv_offloading_backend"),
    _decide(Verdict.WORKS, "events of the device's prefix cache; zone blocks are never cached", "kv_events_config"),
    _decide(
        Verdict.REFUSED,
        "prompts would wait for an encoder elsewhere, beside those that wait for KV",
        "ec_transfer_config",
    ),
    _decide(Verdict.WORKS, "the encoder's cache is vLLM's own", "ec_manager_config"),
    _decide(Verdict.WORKS, "KV of old weights goes with vLLM's prefix-cache reset", "weight_transfer_config"),
    _decide(Verdict.REFUSED, "the arena is not part of its memory pool", "enable_sleep_mode"),
    _decide(
        Verdict.NO_MATTER,
        "without sleep mode nothing",
        "sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names enable_nccl_comm_suspend",
    ),
    _decide(Verdict.WORKS, "the KV cache has an arena of its own", "enable_cumem_allocator"),
    # Memory ----------------------------------------------------------------------------------------------------------
    _decide(
        Verdict.WORKS,
        "pool and zone share what vLLM gives the KV cache",
        "gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override block_size kv_cache_dtype",
    ),
    _decide(Verdict.REFUSED, "the layers would differ in KV shape", "kv_cache_dtype_skip_layers"),
    _decide(
        Verdict.WORKS,
        "weights in host memory count before the host blocks do",
        "offload_backend cpu_offload_gb cpu_offload_params offload_group_size offload_num_in_group "
        "offload_prefetch_step offload_params",
    ),
    _decide(
        Verdict.WORKS,
        "the device's prefix cache is vLLM's own, the host's knows blocks by its hashes",
        "enable_prefix_caching prefix_caching_hash_algo prefix_match_unit",
    ),
    _decide(
        Verdict.WORKS,
        "layers with a window then keep all their KV, and are served like others",
        "disable_hybrid_kv_cache_manager",
    ),
    _decide(Verdict.WORKS, "measures blocks of the pool", "kv_cache_metrics kv_cache_metrics_sample"),
    # Scheduling ------------------------------------------------------------------------------------------------------
    _decide(Verdict.REFUSED, "-1 would count the lane zone as memory", "max_model_len"),
    _decide(Verdict.REFUSED, "the forecast keeps the pool's headroom", "watermark"),
    _decide(
        Verdict.WORKS,
        "bounds that the decided budgets never exceed",
        "max_num_batched_tokens max_num_scheduled_tokens max_num_seqs max_num_active_seqs "
        "long_prefill_token_threshold long_prefill_token_threshold_adaptive",
    ),
    _decide(Verdict.REFUSED, "it would hold back prompts that the policy starts", "prefill_schedule_interval"),
    _decide(
        Verdict.WORKS, "a layered prompt reserves zone and host blocks for all of itself", "scheduler_reserve_full_isl"
    ),
    _decide(Verdict.WORKS, "without chunks a prompt runs in one step", "enable_chunked_prefill"),
    _decide(Verdict.WORKS, "each has a scheduler class of ours", "async_scheduling"),
    _decide(Verdict.WORKS, "priorities go before deadlines", "scheduling_policy"),
    _decide(Verdict.WORKS, "the front end's own limits, beside overload", "max_num_queued_reqs max_num_queued_tokens"),
    _decide(Verdict.WORKS, "the engine's steps are as before", "stream_interval"),
    _decide(Verdict.REFUSED, "metrics carry the backlog: not with overload: reject", "disable_log_stats"),
    # Models ----------------------------------------------------------------------------------------------------------
    _decide(
        Verdict.REFUSED,
        "decoder-only models whose layers have full attention (MLA too), windows, chunks or states, of one KV shape",
        "model runner",
    ),
    _decide(
        Verdict.REFUSED,
        "ngram, eagle and draft_model work, suffix is untested; what others keep beside the model's KV, and when, too",
        "speculative_config spec_method spec_model",
    ),
    _decide(
        Verdict.WORKS,
        "drafts are room in pool and step like other tokens; KV of wrong ones is never copied",
        "spec_tokens per_request_spec_decode_metrics",
    ),
    _decide(Verdict.REFUSED, "its steps write KV more than once", "diffusion_config"),
    _decide(Verdict.REFUSED, "not kept for tokens whose KV comes from host memory", "enable_return_routed_experts"),
    _decide(Verdict.NO_MATTER, "auxiliary outputs are refused", "aux_output_config"),
    _decide(
        Verdict.NO_MATTER,
        "states are parked as they are; with prefix caching, which keeps others, models with states are refused",
        "mamba_config mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_backend "
        "mamba_ssu_algorithm enable_mamba_shared_prefix_checkpoint enable_mamba_cache_stochastic_rounding "
        "mamba_cache_philox_rounds replayssm_buffer_len use_replayssm gdn_prefill_backend kda_prefill_backend "
        "kda_decode_backend disable_sliding_window swa_bounded_replay prefix_cache_retention_interval engram_config "
        "sparse_indexer_topk_backend enable_hc_sp",
    ),
    _decide(Verdict.NO_MATTER, "layers that share KV are refused", "kv_sharing_fast_prefill"),
    _decide(Verdict.REFUSED, "an encoder alone has no KV", "mm_encoder_only"),
    _decide(
        Verdict.WORKS,
        "images are computed before the KV that holds them; a parked request needs them no more",
        "allowed_local_media_path allowed_media_domains language_model_only limit_mm_per_prompt enable_mm_embeds "
        "interleave_mm_strings media_io_kwargs mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type "
        "mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_tp_mode "
        "mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path "
        "mm_encoder_fp8_scale_save_margin skip_mm_profiling video_pruning_rate video_pruning_method mm_tensor_ipc "
        "mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize disable_chunked_mm_input "
        "enable_tower_connector_lora default_mm_loras enable_mm_processor_stats trust_request_mm_kwargs "
        "enable_shm_tensor_arena",
    ),
    _decide(Verdict.NO_MATTER, "pooling is refused", "convert pooler_config enable_flash_late_interaction"),
    _decide(
        Verdict.APART,
        "how a model is found, read and computed",
        "model_tag model_weights tokenizer hf_config_path skip_tokenizer_init tokenizer_mode trust_remote_code "
        "download_dir safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size "
        "load_format config_format dtype seed revision code_revision hf_token hf_overrides model_class_overrides "
        "tokenizer_revision quantization quantization_config allow_deprecated_quantization model_loader_extra_config "
        "ignore_patterns model_impl use_tqdm_on_load pt_load_map_location linear_backend moe_backend kernel_config "
        "monokernel enable_flashinfer_autotune ir_op_priority max_parallel_loading_workers served_model_name",
    ),
    _decide(
        Verdict.WORKS,
        "attention runs as in vLLM, in the blocks that it is told; a cache layout whose outermost dimension is not the "
        "layer is refused by the worker",
        "attention_backend attention_config disable_cascade_attn",
    ),
    _decide(
        Verdict.WORKS,
        "a step that copies layer by layer runs without graphs",
        "enforce_eager compilation_config cudagraph_capture_sizes max_cudagraph_capture_size optimization_level "
        "performance_mode",
    ),
    _decide(
        Verdict.WORKS,
        "prefix hashes know the adapter",
        "enable_lora max_loras max_lora_rank fully_sharded_loras max_cpu_loras lora_dtype lora_target_modules "
        "specialize_active_lora enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels lora_modules",
    ),
    _decide(Verdict.WORKS, "parked like others: vLLM keeps the embeddings", "enable_prompt_embeds"),
    # Sampling and output ---------------------------------------------------------------------------------------------
    _decide(
        Verdict.WORKS,
        "a parked request keeps its sampling state, as a preempted one does",
        "max_logprobs logprobs_mode use_fp64_gumbel enable_trace_replay return_sampling_mask "
        "structured_outputs_config reasoning_parser reasoning_parser_plugin reasoning_config watermark_config "
        "generation_config override_generation_config enable_batch_sharded_sampling",
    ),
    _decide(
        Verdict.APART,
        "how requests are read and answers written",
        "io_processor_plugin renderer_num_workers tokens_only",
    ),
    # Processes and devices -------------------------------------------------------------------------------------------
    _decide(
        Verdict.WORKS, "each worker has its own lanes and host blocks", "tensor_parallel_size disable_custom_all_reduce"
    ),
    _decide(Verdict.REFUSED, "layers are counted per engine", "pipeline_parallel_size"),
    _decide(
        Verdict.REFUSED,
        "blocks would be split between ranks",
        "prefill_context_parallel_size decode_context_parallel_size",
    ),
    _decide(
        Verdict.NO_MATTER,
        "context parallelism is refused",
        "dcp_comm_backend dcp_q_replicate dcp_kv_cache_interleave_size cp_kv_cache_interleave_size",
    ),
    _decide(
        Verdict.REFUSED,
        "mp and uni only: with external_launcher each rank would schedule by its own clock",
        "distributed_executor_backend",
    ),
    _decide(Verdict.REFUSED, "engines in Ray's actors would not hear of a changed policy", "data_parallel_backend"),
    _decide(Verdict.NO_MATTER, "Ray is refused", "ray_workers_use_nsight"),
    _decide(Verdict.REFUSED, "an engine's host memory is counted on one machine", "nnodes"),
    _decide(Verdict.REFUSED, "host memory is divided among the engines at the start", "enable_elastic_ep"),
    _decide(Verdict.NO_MATTER, "elastic expert parallelism is refused", "elastic_ep_max_dp_size"),
    _decide(Verdict.REFUSED, "an engine would go on after a step whose copies failed", "enable_fault_tolerance"),
    _decide(Verdict.NO_MATTER, "fault tolerance is refused", "fault_tolerance_config"),
    _decide(
        Verdict.REFUSED,
        "on CUDA, two halves of a step would run each layer's hook",
        "enable_dbo ubatch_size",
    ),
    _decide(Verdict.NO_MATTER, "microbatching is refused", "dbo_decode_token_threshold dbo_prefill_token_threshold"),
    _decide(
        Verdict.WORKS,
        "each engine decides for itself, and takes its part of the machine's memory",
        "data_parallel_size data_parallel_rank data_parallel_start_rank data_parallel_size_local "
        "data_parallel_address data_parallel_rpc_port data_parallel_hybrid_lb data_parallel_external_lb "
        "data_parallel_multi_port_external_lb dp_sync_interval disable_nccl_for_dp_synchronization "
        "data_parallel_supervisor_port dp_supervisor_probe_failure_threshold dp_supervisor_probe_interval_s "
        "dp_supervisor_probe_timeout_s",
    ),
    _decide(
        Verdict.APART,
        "experts have no KV",
        "enable_expert_parallel enable_ep_weight_filter all2all_backend eplb_config enable_eplb "
        "expert_placement_strategy",
    ),
    _decide(
        Verdict.APART,
        "where processes run and how they find each other",
        "master_addr master_port node_rank distributed_timeout_seconds cpu_distributed_timeout_seconds numa_bind "
        "numa_bind_nodes numa_bind_cpus device_ids _api_process_count _api_process_rank headless shutdown_timeout "
        "fail_on_environ_validation additional_config watchdog_config",
    ),
    _decide(Verdict.WORKS, "each front end has a gate and hears of the backlog", "api_server_count"),
    # Watching --------------------------------------------------------------------------------------------------------
    _decide(
        Verdict.APART,
        "logs, traces, profiles and vLLM's other metrics",
        "aggregate_engine_logging show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces "
        "custom_histogram_buckets cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics "
        "enable_logging_iteration_details jit_monitor_mode jit_monitor_verbose profiler_config logging_config "
        "log_level log_config_file enable_log_requests",
    ),
    _decide(
        Verdict.APART,
        "the HTTP server, in front of the gate or behind the answer",
        "allow_credentials allowed_headers allowed_methods allowed_origins anthropic_disabled_thinking_effort api_key "
        "chat_template chat_template_content_format cohere_format cohere_is_reasoning_model config "
        "default_chat_template_kwargs disable_access_log_for_endpoints disable_fastapi_docs "
        "disable_uvicorn_access_log enable_auto_tool_choice enable_force_include_usage enable_log_deltas "
        "enable_log_outputs enable_offline_docs enable_per_request_metrics enable_prompt_tokens_details "
        "enable_request_id_headers enable_scale_out enable_server_load_tracking enable_ssl_refresh "
        "enable_tokenizer_info_endpoint exclude_tools_when_tool_choice_none fingerprint_mode fingerprint_value grpc "
        "grpc_port h11_max_header_count h11_max_incomplete_event_size help host log_error_stack max_log_len port "
        "reasoning_effort_map response_role return_tokens_as_token_ids root_path sse_keep_alive_interval "
        "ssl_ca_certs ssl_cert_reqs "
        "ssl_certfile ssl_ciphers ssl_keyfile tool_call_parser tool_parser_plugin tool_server tool_strict_level "
        "trust_request_chat_template uds uvicorn_log_level",
    ),
)

NOT_IN_ALL = _set(
    "kv_transfer_config.kv_ip kv_transfer_config.kv_rank kv_transfer_config.kv_parallel_size "
    "kv_transfer_config.kv_buffer_size enable_hc_sp enable_shm_tensor_arena custom_histogram_buckets "
    "sleep_mode_offload_cudagraph grpc_port monokernel sleep_mode_backend watchdog_config reasoning_effort_map"
)
"""Options that only some of the supported releases of vLLM have."""
