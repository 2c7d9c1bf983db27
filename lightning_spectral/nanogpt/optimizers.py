"""How each recipe is optimised: learning rates by role of the parameters, as data, and the optimizer they make."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn, optim
from torch.optim import AdamW, Optimizer

from lightning_spectral.nanogpt.arguments import check_number, shown
from lightning_spectral.nanogpt.combined import CombinedOptimizer

Recipe = Literal[
    "baseline",
    "rope",
    "muon",
    "untied",
    "value_mix",
    "unet",
    "fixed_window",
    "flex_window",
    "vte",
    "better_window",
    "sparse_embed",
    "truncated_rope",
    "softcap",
    "fp8_head",
    "long_short",
    "attn_scale",
    "sub_lr",
]
Role = Literal["embeddings", "head", "scalars", "matrices"]
ROLES: tuple[Role, ...] = ("embeddings", "head", "scalars", "matrices")
"""Tables looked up by token or position; the untied head; vectors and single numbers; the blocks' 2-D matrices."""


class RecipeOptimizer(NamedTuple):
    """How a recipe was trained in the speed runs it comes from."""

    embeddings: float
    """Peak learning rate of the tables, and of the head where it is tied to one."""
    head: float
    """Peak learning rate of an untied head."""
    scalars: float
    """Peak learning rate of vectors and single numbers, which never decay."""
    matrices: float
    """Peak learning rate of the blocks' matrices."""
    matrix_optimizer: Literal["adamw", "muon"] = "muon"
    """What moves the blocks' matrices; all else is AdamW's."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all but vectors and single numbers."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments, for the head and the matrices."""
    lookup_betas: tuple[float, float] = (0.9, 0.95)
    """The same for tables, vectors and single numbers."""
    momentum: tuple[float, float] = (0.95, 0.95)
    """Muon's momentum at the start and from MOMENTUM_STEPS on, linear between."""
    decay: Literal["cosine", "linear"] = "linear"
    """How the learning rate comes down to zero."""
    cooldown: float = 0.1
    """Fraction of the steps after the warm-up over which it does."""

    def momentum_at(self, step: int) -> float:
        """Muon's momentum, in [0, 1), after so many optimizer steps."""
        start, end = self.momentum
        return start + (end - start) * min(step / MOMENTUM_STEPS, 1.0)


MOMENTUM_STEPS = 500
"""Optimizer steps over which Muon's momentum rises."""

SUB_LR_BASE = 0.008
SUB_LR_MULTIPLIERS: dict[Role, float] = {"embeddings": 75.0, "head": 27.5, "scalars": 5.0}
"""Of SUB_LR_BASE, AdamW's learning rate in recipe sub_lr: they make 0.6, 0.22 and 0.04."""

ADAMW_MATRICES = 0.004
"""Peak learning rate of the blocks' matrices where a recipe with Muon is trained with AdamW instead."""

# The optimizer does not change where the architecture alone does.
OPTIMIZERS: dict[str, RecipeOptimizer] = {
    "baseline": RecipeOptimizer(3e-4, 3e-4, 3e-4, 3e-4, "adamw", weight_decay=0.1, decay="cosine", cooldown=1.0),
    "rope": RecipeOptimizer(6e-4, 6e-4, 6e-4, 6e-4, "adamw", decay="cosine", cooldown=1.0),
}
OPTIMIZERS["muon"] = RecipeOptimizer(embeddings=0.0036, head=0.0036, scalars=0.0036, matrices=0.00036)
OPTIMIZERS["untied"] = OPTIMIZERS["muon"]._replace(embeddings=0.3, head=0.002, scalars=0.02, matrices=0.02)
OPTIMIZERS["value_mix"] = OPTIMIZERS["untied"]._replace(momentum=(0.85, 0.95))
OPTIMIZERS["unet"] = OPTIMIZERS["value_mix"]._replace(embeddings=0.6, head=0.008, scalars=0.04, matrices=0.04)
OPTIMIZERS |= dict.fromkeys(("fixed_window", "flex_window", "vte", "better_window"), OPTIMIZERS["unet"])
OPTIMIZERS["sparse_embed"] = OPTIMIZERS["unet"]._replace(lookup_betas=(0.8, 0.95))
OPTIMIZERS |= dict.fromkeys(
    ("truncated_rope", "softcap", "fp8_head", "long_short", "attn_scale"), OPTIMIZERS["sparse_embed"]
)
OPTIMIZERS["sub_lr"] = OPTIMIZERS["sparse_embed"]._replace(
    embeddings=SUB_LR_BASE * SUB_LR_MULTIPLIERS["embeddings"],
    head=SUB_LR_BASE * SUB_LR_MULTIPLIERS["head"],
    scalars=SUB_LR_BASE * SUB_LR_MULTIPLIERS["scalars"],
)


def role_of(name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
    """Tell what a parameter is for, from its path in the model, its shape and the kind of module that holds it.

    matrices are the weights of linear layers inside blocks; embeddings those of embedding layers, wherever they are,
    and bare parameters named after one; head is for linear layers outside blocks; scalars for all else.
    """
    path = name.split(".")
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if parameter.ndim < 2:
        return "scalars"
    if isinstance(owner, nn.Linear) or "head" in path:
        return "matrices" if "blocks" in path and parameter.ndim == 2 else "head"
    return "embeddings" if any("embed" in part for part in path) else "scalars"


def parameters_by_role(model: nn.Module) -> dict[Role, list[nn.Parameter]]:
    """Sort a model's trainable parameters, in its order, by role; one that is shared counts where it comes first."""
    found: dict[Role, list[nn.Parameter]] = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[role_of(name, parameter, model.get_submodule(name.rpartition(".")[0]))].append(parameter)
    return found


def build_optimizer(model: nn.Module, settings: RecipeOptimizer) -> Optimizer:
    """Make the optimizer of a recipe: AdamW where it moves everything; else Muon and AdamW as one.

    Groups have a name, under which LearningRateMonitor logs them. ValueError if torch has no Muon where it is needed.
    """
    if has_one_learning_rate(settings):
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        groups = [
            {"name": "matrices_and_embeddings", "params": matrices, "weight_decay": settings.weight_decay},
            {"name": "scalars", "params": others, "weight_decay": 0.0},
        ]
        return AdamW([group for group in groups if group["params"]], lr=settings.matrices, betas=settings.betas)
    groups_by_role = {role: _group(role, found, settings) for role, found in parameters_by_role(model).items() if found}
    if settings.matrix_optimizer == "adamw" or "matrices" not in groups_by_role:
        return AdamW(list(groups_by_role.values()))
    matrices_group = groups_by_role.pop("matrices")
    del matrices_group["betas"]
    # "original" multiplies the update by sqrt(max(1, rows / columns))
    if not hasattr(optim, "Muon"):
        raise ValueError(
            f"matrix_optimizer must be 'adamw' with torch {torch.__version__}, got 'muon', which needs torch>=2.9"
        )
    muon = optim.Muon([matrices_group], momentum=settings.momentum_at(0), adjust_lr_fn="original")
    return CombinedOptimizer([muon, AdamW(list(groups_by_role.values()))]) if groups_by_role else muon


def _group(role: Role, parameters: list[nn.Parameter], settings: RecipeOptimizer) -> dict[str, Any]:
    return {
        "name": role,
        "params": parameters,
        "lr": getattr(settings, role),
        "weight_decay": 0.0 if role == "scalars" else settings.weight_decay,
        "betas": settings.lookup_betas if role in ("embeddings", "scalars") else settings.betas,
    }


def group_table(optimizer: Optimizer) -> Table:
    """Show what is moved by what, and how fast: a row for each group, with the peak of its learning rate."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "tensors": lambda group: f"{len(group['params']):,}",
        "parameters": lambda group: f"{sum(p.numel() for p in group['params']):,}",
        "learning rate": lambda group: f"{group.get('initial_lr', group['lr']):.3g}",
        "weight decay": lambda group: f"{group['weight_decay']:.3g}",
    }
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("group", "optimizer"):
        table.add_column(heading, overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for part in optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else [optimizer]:
        for number, group in enumerate(part.param_groups):
            name, cells = group.get("name", str(number)), [cell(group) for cell in columns.values()]
            table.add_row(name, type(part).__name__, *cells)
    return table


TINY_LEARNING_RATE_FACTORS = {"baseline": 5.0, "rope": 5.0, "muon": 5.0}
"""For tier tiny; 1 for the other recipes.

The rates were chosen at width 768 and half a million tokens a step; tier tiny has width 128 and 2,048 tokens, and runs
of a few hundred steps. An AdamW step changes a matrix, in spectral norm, by an amount that grows with its width, so
that a narrow one bears more. From untied on the rates do not depend on width: an update by Muon has singular values
near 1, and a table whose rows are normalised when they are looked up is moved relative to its own size. Measured with
unet on steps of 1,024 tokens: validation loss 2.10, 2.02, 2.00 nats a byte after 100 steps with 0.5, 1 and 2 times the
rates; 1.62 and 1.68 after 300 with 1 and 2 times them (rope with its 5: 1.92).
"""


def settings_for(
    tier: str,
    recipe: str,
    *,
    matrix_optimizer: str | None = None,
    learning_rate: float | None = None,
    lr_multiplier: float = 1.0,
    weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
    cooldown: float | None = None,
) -> RecipeOptimizer:
    """Look up how a recipe is optimised at a size, and change what is not None; see `NanoGPT` for the arguments.

    ValueError if there is no such recipe, or a number is out of its range or does not apply to the recipe.
    """
    if not isinstance(recipe, str) or recipe not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {shown(recipe)}")
    check_number(lr_multiplier=lr_multiplier)
    given = {"learning_rate": learning_rate, "weight_decay": weight_decay, "cooldown": cooldown}
    check_number(hint="None takes the recipe's", **{name: value for name, value in given.items() if value is not None})
    for name in ("learning_rate", "weight_decay"):
        value = given[name]
        if value is not None and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}: None takes the recipe's")
    if betas is not None and not _are_betas(betas):
        raise ValueError(f"betas must be two decay rates from 0 to below 1, got {shown(betas)}: (0.9, 0.95) is usual")
    if lr_multiplier <= 0:
        raise ValueError(f"lr_multiplier must be above 0, got {lr_multiplier}: 1 leaves the recipe's learning rates")
    if cooldown is not None and not 0 < cooldown <= 1:
        raise ValueError(f"cooldown must be a fraction in (0, 1], got {cooldown}: None takes the recipe's")
    settings = OPTIMIZERS[recipe]
    if tier == "tiny":
        settings = scaled(settings, TINY_LEARNING_RATE_FACTORS.get(recipe, 1.0))
    if matrix_optimizer is not None and not (
        isinstance(matrix_optimizer, str) and matrix_optimizer in ("muon", "adamw")
    ):
        raise ValueError(f"matrix_optimizer must be one of muon, adamw, got {shown(matrix_optimizer)}")
    if matrix_optimizer not in (None, settings.matrix_optimizer):
        if settings.matrix_optimizer == "adamw":
            raise ValueError(
                f"matrix_optimizer must be adamw for {recipe}, which has no learning rate for another, got "
                f"{matrix_optimizer!r}: take optimizer=muon or a later one"
            )
        settings = settings._replace(matrix_optimizer="adamw", matrices=ADAMW_MATRICES)
    if learning_rate is not None:
        settings = with_learning_rate(settings, learning_rate)
    settings = scaled(settings, lr_multiplier)
    if weight_decay is not None:
        settings = settings._replace(weight_decay=weight_decay)
    if betas is not None:
        settings = settings._replace(betas=(betas[0], betas[1]), lookup_betas=(betas[0], betas[1]))
    return settings if cooldown is None else settings._replace(cooldown=cooldown)


def _are_betas(betas: Any) -> bool:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return False
    try:
        check_number(first=betas[0], second=betas[1])
    except ValueError:
        return False
    return all(0 <= beta < 1 for beta in betas)


def with_learning_rate(settings: RecipeOptimizer, learning_rate: float) -> RecipeOptimizer:
    """Change the learning rate of a recipe that has one for everything; ValueError if it has several."""
    if not has_one_learning_rate(settings):
        several = ", ".join(f"{role} {getattr(settings, role):.3g}" for role in ROLES)
        raise ValueError(
            f"learning_rate must be None where there are several ({several}), got {learning_rate}: "
            f"multiply them all by lr_multiplier"
        )
    rates: dict[str, Any] = dict.fromkeys(ROLES, learning_rate)
    return settings._replace(**rates)


def has_one_learning_rate(settings: RecipeOptimizer) -> bool:
    """Tell whether AdamW moves everything alike."""
    return settings.matrix_optimizer == "adamw" and len({getattr(settings, role) for role in ROLES}) == 1


def scaled(settings: RecipeOptimizer, factor: float) -> RecipeOptimizer:
    """Multiply all learning rates."""
    rates: dict[str, Any] = {role: factor * getattr(settings, role) for role in ROLES}
    return settings._replace(**rates)
