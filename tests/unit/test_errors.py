import pytest

from layerkv import errors


@pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"LayerKVError"}))
def test_every_error_is_a_layerkv_error(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.LayerKVError)


def test_a_config_error_is_a_value_error_so_that_vllm_answers_400() -> None:
    assert issubclass(errors.ConfigError, ValueError)


def test_running_out_of_memory_is_not_the_users_mistake() -> None:
    assert not issubclass(errors.CapacityError, ValueError)


@pytest.mark.parametrize("name", errors.__all__)
def test_the_tree_in_the_docstring_names_every_error(name: str) -> None:
    assert errors.__doc__ is not None
    assert name in errors.__doc__
