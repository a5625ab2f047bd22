"""Private parts of DeepSpeed, torch and transformers on which we rely: a version that changes one fails
here."""

import inspect

import pytest


@pytest.fixture(scope="module")
def deepspeed():
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    return deepspeed


def test_the_op_that_is_not_compiled_still_has_its_name(deepspeed):
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
    source = inspect.getsource(build_shm_op)
    assert '"ShareMemCommBuilder"' in source
    assert "__compatible_ops__.get(builder.NAME, False)" in source


def test_zeros_shards_still_have_their_names(deepspeed):
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    first, third = (
        inspect.getsource(optimizer) for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    )
    assert "self.single_partition_of_fp32_groups" in first
    assert "if not self._hp_optimizer_states_linked:" in inspect.getsource(
        DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state
    )
    assert "self.fp32_partitioned_groups_flat" in third


def test_deepspeed_still_skips_a_step_whose_norm_is_not_finite(deepspeed):
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert "is_invalid_grad_norm(scaled_global_grad_norm)" in inspect.getsource(optimizer)


def test_a_base_is_still_sharded_by_one_method(deepspeed):
    init = deepspeed.zero.Init
    assert "_zero_init_param" in inspect.getsource(init)
    assert list(inspect.signature(init._zero_init_param).parameters) == ["self", "param"]
    assert callable(init._convert_to_deepspeed_param)
    assert callable(init._partition_param)


def test_ddp_still_ignores_parameters_by_name():
    from torch.nn.parallel import DistributedDataParallel

    parameters = inspect.signature(
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ).parameters
    assert list(parameters) == ["module", "params_and_buffers_to_ignore"]


def test_trainer_still_steps_and_wraps_where_zero_comes_in():
    from transformers import Trainer

    source = inspect.getsource(Trainer._run_epoch)
    order = ["self._clip_grad_norm(model)", "self._get_grad_norm(model", "self.optimizer.step()"]
    assert sorted(order, key=source.index) == order
    assert "use_accelerator_prepare = model is self.model" in inspect.getsource(Trainer._prepare_for_training)
    assert "self.accelerator.backward(loss" in inspect.getsource(Trainer.training_step)
