"""TrainState: everything that a resumed run continues from survives a checkpoint."""

import dataclasses
import json
import math

import torch

from load import make_state, prepare_model
from model import GPT, GPTConfig
from nanogpt import checkpoint
from nanogpt.distributed import World
from nanogpt.state import TrainState
from train import TrainConfig

WORLD = World(0, 1, torch.device("cpu"), torch.float16)  # float16 has a loss scaler


def make_new_state() -> TrainState:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=9, block_size=4))
    return make_state(TrainConfig(optimizer="muon", skip_spikes=5.0), model, WORLD)


def test_state_dict_round_trip_restores_every_field():
    state = make_new_state()
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizer.step(1.0, torch.ones(()), torch.zeros(()))
    for norm in (1.0, math.inf, 2.0):
        state.guard.check(torch.ones(()), torch.tensor(norm))
    state.guard.skipped += 3
    state.scaler.scale(torch.ones(()))
    state.scaler.update(new_scale=1024.0)
    state.clock.start()
    state.clock.stop()
    state.record_evaluation(1.5)
    state.record_update(8)
    state.record_evaluation(1.75)
    state.clipped = 4

    saved = json.loads(json.dumps(state.state_dict()))
    model_tensors, optimizer_tensors = state.tensors()
    loaded = make_new_state()
    loaded.model.load_state_dict(model_tensors)
    loaded.load_state_dict(saved, {name: t.clone() for name, t in optimizer_tensors.items()})

    assert json.loads(json.dumps(loaded.state_dict())) == saved
    assert all(map(torch.equal, loaded.optimizer.state_tensors().values(), optimizer_tensors.values()))
    scalars = ("step", "samples", "val_loss", "best_val_loss", "evals_since_best", "clipped")
    assert [getattr(loaded, name) for name in scalars] == [1, 8, 1.75, 1.5, 1, 4]
    # A field that is added must be saved, and added here.
    objects = {"model", "optimizer", "scaler", "guard", "clock"}
    assert {field.name for field in dataclasses.fields(TrainState)} == {*scalars, *objects}
    assert loaded.clock.seconds == state.clock.seconds > 0
    assert loaded.scaler.state_dict()["scale"] == 1024.0
    assert torch.equal(loaded.guard.norms.nan_to_num(), state.guard.norms.nan_to_num())
    assert loaded.guard.num_checked == state.guard.num_checked == 3


def test_state_of_earlier_versions_and_other_dtypes_is_loaded():
    state = make_new_state()
    saved = state.state_dict()
    scale = saved["scaler"]["scale"]
    del saved["since_best"], saved["clipped"]
    saved = {**checkpoint.ADDED_LATER, **saved}
    state.load_state_dict(saved | {"scaler": {}, "guard": {}}, state.optimizer.state_tensors())  # saved in float32
    assert state.scaler.state_dict()["scale"] == scale
    assert (state.evals_since_best, state.clipped, state.best_val_loss) == (0, 0, math.inf)


def test_record_evaluation_counts_since_the_best():
    state = make_new_state()
    assert [state.record_evaluation(loss) for loss in (2.0, 2.0, 1.0, 1.5)] == [True, False, True, False]
    assert (state.best_val_loss, state.evals_since_best) == (1.0, 1)


def test_prepare_model_sets_the_options_of_training():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=9, block_size=4))
    prepare_model(TrainConfig(activation_checkpointing=True, loss_chunk=7), model, WORLD)
    assert (model.activation_checkpointing, model.loss_chunk) == (True, 7)
