"""CombinedOptimizer does what its parts would do by themselves, for all who take it for one optimizer."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import SGD, AdamW, Muon

from lightning_spectral.nanogpt import NanoGPT, TextData
from lightning_spectral.nanogpt.combined import CombinedOptimizer


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 4), (4, 6), (5,), (3,))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def parts(p):
    groups = [{"params": [p[2]], "lr": 0.1}, {"params": [p[3]], "lr": 0.2}]
    return [Muon(p[:2], lr=0.3, weight_decay=0.1), AdamW(groups, weight_decay=0.0)]


def set_gradients(p, step):
    for index, (parameter, gradient) in enumerate(zip(p, parameters(seed=1 + step), strict=True)):
        parameter.grad = gradient.detach() * (index + 1)


def train(p, optimizers, steps):
    for step in steps:
        set_gradients(p, step)
        for optimizer in optimizers:
            optimizer.step()


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_steps_are_those_of_the_parts():
    p, q = parameters(), parameters()
    train(p, [CombinedOptimizer(parts(p))], range(3))
    train(q, parts(q), range(3))
    assert_equal(p, q)


def test_groups_are_those_of_the_parts():
    muon, adamw = parts(parameters())
    optimizer = CombinedOptimizer([muon, adamw])
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.2]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert (muon.param_groups[0]["lr"], adamw.param_groups[1]["lr"]) == (0.15, 0.1)


def test_state_that_parts_have_already_is_kept():
    p, q = parameters(), parameters()
    worn = parts(p)
    train(p, worn, range(2))
    train(p, [CombinedOptimizer(worn)], range(2, 4))
    train(q, parts(q), range(4))
    assert_equal(p, q)


def through_state_dict(p, optimizer):
    q = copy.deepcopy(p)
    restored = CombinedOptimizer(parts(q))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return q, restored


def through_copy(p, optimizer):
    return copy.deepcopy((p, optimizer))


def through_pickle(p, optimizer):
    return pickle.loads(pickle.dumps((p, optimizer)))


@pytest.mark.parametrize("way", [through_state_dict, through_copy, through_pickle])
def test_goes_on_exactly(way):
    p = parameters()
    optimizer = CombinedOptimizer(parts(p))
    train(p, [optimizer], range(2))
    optimizer.param_groups[0]["lr"] = 0.01  # as a scheduler would have
    optimizer.param_groups[2]["lr"] = 0.02
    q, restored = way(p, optimizer)
    train(p, [optimizer], range(2, 5))
    train(q, [restored], range(2, 5))
    assert_equal(p, q)
    assert restored.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert [part.param_groups[0]["lr"] for part in restored.optimizers] == [0.01, 0.1]
    assert all(part.state is restored.state for part in restored.optimizers)


def test_checkpoint_is_plain(tmp_path):
    p = parameters()
    optimizer = CombinedOptimizer(parts(p))
    train(p, [optimizer], range(2))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert [len(group["params"]) for group in loaded["param_groups"]] == [2, 1, 1]
    assert sorted(loaded["state"]) == [0, 1, 2, 3]


def test_closure_is_called_once_with_gradients():
    p, calls = parameters(), []
    optimizer = CombinedOptimizer(parts(p))

    def closure():
        optimizer.zero_grad()
        loss = sum(x.square().sum() for x in p)
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1
    optimizer.zero_grad()
    assert all(x.grad is None for x in p)


@pytest.mark.parametrize("bad", [None, 0, 2])
def test_gradient_scaler_sees_all_parameters(bad):
    p, q = parameters(), parameters()
    optimizer, scaler = CombinedOptimizer(parts(p)), torch.amp.GradScaler("cpu", init_scale=1024.0)
    set_gradients(p, 0)
    for parameter in p:
        parameter.grad *= scaler.scale(torch.tensor(1.0))
    if bad is not None:
        p[bad].grad.view(-1)[0] = torch.inf
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(p, 1e6)
    scaler.step(optimizer)
    scaler.update()
    if bad is None:
        train(q, parts(q), range(1))
    assert scaler.get_scale() == (1024.0 if bad is None else 512.0)
    assert_equal(p, q)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("precision", ["32", "bf16", "fp16", "accumulated"])
def test_resumed_run_goes_on_bit_by_bit(precision, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"0123456789" * 48)

    def fit(ckpt_path=None, **arguments):
        if precision == "fp16":
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
            arguments["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
        else:
            arguments["precision"] = "bf16-mixed" if precision == "bf16" else "32-true"
        arguments["accumulate_grad_batches"] = 2 if precision == "accumulated" else 1
        pl.seed_everything(0, verbose=False)
        model = NanoGPT(
            optimizer="unet", lr_multiplier=0.01, num_layers=1, num_heads=1, width=8, block_size=8, warmup_steps=2
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)],
            gradient_clip_val=0.1,
            limit_val_batches=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=8,
            **arguments,
        )
        trainer.fit(model, TextData(str(tmp_path / "text.txt"), block_size=8, batch_size=7), ckpt_path=ckpt_path)
        return model, trainer.optimizers[0]

    whole, optimizer = fit()
    resumed, restored = fit(ckpt_path=tmp_path / "saved" / "step=3.ckpt")
    assert isinstance(restored, CombinedOptimizer)
    assert resumed.global_step == whole.global_step == 8
    assert_equal(whole.parameters(), resumed.parameters())
    for a, b in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert_equal(a.values(), b.values())
    assert optimizer.state_dict()["param_groups"] == restored.state_dict()["param_groups"]


def test_refuses_a_parameter_of_two():
    p = parameters()
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        CombinedOptimizer([SGD(p), SGD(p[:1])])


def test_refuses_to_be_empty():
    with pytest.raises(ValueError, match="empty parameter list"):
        CombinedOptimizer([])


def test_refuses_a_group_that_comes_late():
    optimizer = CombinedOptimizer(parts(parameters()))
    with pytest.raises(ValueError, match="param_group must be added to one of Muon, AdamW before they are combined"):
        optimizer.add_param_group({"params": parameters()})
