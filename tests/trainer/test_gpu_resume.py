"""On a GPU: a run resumes bit for bit with float16's scaler, and a full GPU is reported with the batch."""

import pytest
import torch
from made import config_of, side_of, trainer_of
from transformers import TrainerCallback

from qwenlora.configs.schema import Lora, Model
from qwenlora.run import checkpoints
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.loop.state import adapter_of
from qwenlora.trainer.ranks.faults import TrainingFault

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


class AskAt(TrainerCallback):
    def __init__(self, request, step):
        self.request, self.step = request, step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            self.request.ask("x")


def attempt(tiny, folder, dtype, stop=0):
    config = config_of(max_steps=6, save_strategy="steps", save_steps=2)
    update = {"lora": Lora(lora_dropout=0.1), "model": Model(name_or_path="tiny", dtype=dtype)}
    made = trainer_of(tiny, folder, side_of(24), config.model_copy(update=update))
    newest = next(iter(RunFolder(folder).checkpoints()), None)
    if newest:
        assert checkpoints.flaw(newest) == ""
        made.load(newest)
    if stop:
        made.stop.on_step_begin = lambda args, state, *_, **__: (
            state.global_step + 1 == stop and made.stop.request.ask("x")
        )
    made.train(resume_from_checkpoint=str(newest) if newest else None)
    made.saver.wait()
    return made


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_stopped_run_goes_on_bit_for_bit(tiny, tmp_path, dtype):
    torch.use_deterministic_algorithms(True, warn_only=True)
    whole = attempt(tiny, tmp_path / "whole", dtype)
    assert attempt(tiny, tmp_path / "cut", dtype, stop=3).state.global_step == 3
    cut = attempt(tiny, tmp_path / "cut", dtype)
    torch.use_deterministic_algorithms(False)
    expected = adapter_of(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_of(cut.model).items())
    state = checkpoints.read_state(RunFolder(tmp_path / "cut").checkpoint(6))
    assert (state.scaler is not None) == (dtype == "float16")


def test_a_full_gpu_is_reported_with_the_batch(tiny, tmp_path):
    made = trainer_of(tiny, tmp_path, side_of(24), config_of())
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(TrainingFault, match="GPU out of memory on rank 0 while step 1 was trained"):
            made.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
