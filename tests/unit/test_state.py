"""TrainState: everything that a resumed run continues from survives a checkpoint."""

import dataclasses
import json
import math

import torch

from load import make_state, prepare_model
from model import GPT, GPTConfig
from nanogpt import checkpoint
from nanogpt.distributed import World
from nanogpt.metrics import Stopwatch
from nanogpt.state import TrainState
from train import TrainConfig

WORLD = World(0, 1, torch.device("cpu"), torch.float16)  # float16 has a loss scaler


def make_new_state() -> TrainState:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=9, block_size=4))
    return make_state(TrainConfig(optimizer="muon", skip_spikes=5.0), model, WORLD)


def test_state_dict_restores_every_field():
    state = make_new_state()
    state.clock = Stopwatch(3.0)
    state.record_evaluation(1.5)
    state.record_update(8)
    state.record_evaluation(1.75)
    state.clipped = 4
    saved = json.loads(json.dumps(state.state_dict()))
    numbers = {"step": 1, "samples": 8, "time_s": 3.0, "val_loss": 1.75, "best_val_loss": 1.5}
    numbers |= {"since_best": 1, "clipped": 4}
    assert saved.items() >= numbers.items()
    loaded = make_new_state()
    loaded.load_state_dict(saved, state.optimizer.state_tensors())
    assert json.loads(json.dumps(loaded.state_dict())) == saved
    # A field that is added must be saved, and added here.
    scalars = {"step", "samples", "val_loss", "best_val_loss", "evals_since_best", "clipped"}
    objects = {"model", "optimizer", "scaler", "guard", "clock"}
    assert {field.name for field in dataclasses.fields(TrainState)} == scalars | objects


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
    model = make_new_state().model
    prepare_model(TrainConfig(activation_checkpointing=True, loss_chunk=7), model, WORLD)
    assert (model.activation_checkpointing, model.loss_chunk) == (True, 7)
