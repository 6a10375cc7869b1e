"""Optimizers that people use, by package: how each is made, and why some are left out."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]
BOTH, MATRICES, SQUARES, LORA = ((4, 3), (5,)), ((4, 3), (3, 5)), ((64, 64), (5,)), ((2, 4), (3, 2))
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def plain(params: list[Tensor]) -> Any:
    return params


def named(params: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """As model.named_parameters() is: a generator, which is used up once the optimizer is made."""
    yield from ((f"layers.{n}.{'mlp' if p.ndim == 2 else 'norm'}", p) for n, p in enumerate(params))


class Model(torch.nn.Module):
    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(params)


def muon_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in params if p.ndim >= 2], "use_muon": True},
        {"params": [p for p in params if p.ndim < 2], "use_muon": False},
    ]


def low_rank(**more: Any) -> Callable[[list[Tensor]], list[dict[str, Any]]]:
    """Matrices are projected, anew at every second step."""

    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        matrices, others = ([p for p in params if (p.ndim == 2) is flat] for flat in (True, False))
        return [{"params": matrices, "rank": 2, "update_proj_gap": 2, "scale": 0.25, **more}, {"params": others}]

    return groups


@dataclass(frozen=True)
class Kind:
    """`name`: the class, and after a blank what is special."""

    package: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = F64
    shapes: Shapes = BOTH
    given: Callable[[list[Tensor]], Any] = plain
    resumes: bool = True  # its own state_dict holds all that it goes on from

    def __str__(self) -> str:
        return f"{self.package}.{self.name.replace(' ', '-')}"

    def make(self, params: list[Tensor]) -> Any:
        kind = getattr(imported(self.package), self.name.split()[0], None)
        if kind is None:
            pytest.skip(f"this version of {self.package} has no {self.name}")
        base = kind(self.given(params), **self.options)
        if "ScheduleFree" in self.name and "Closure" not in self.name:
            base.train()
        return base


def imported(package: str) -> Any:
    """What a package warns of and says as it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(package, reason=f'{package} is not installed: pip install -e ".[zoo]"')


def classes(package: str) -> set[str]:
    """The names of the package's own optimizers."""
    found = vars(importlib.import_module(package)).items()
    own = {n: k for n, k in found if isinstance(k, type) and issubclass(k, torch.optim.Optimizer)}
    return {n for n, k in own.items() if package == "torch.optim" or not k.__module__.startswith("torch.")}


# --------------------------------------------------------------------------------------------- as they come, in float64

AS_THEY_COME = {
    "torch.optim": "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD",
    "pytorch_optimizer": """
        A2Grad ADOPT APOLLO ASGD AccSGD AdEMAMix AdaBelief AdaBound AdaDelta AdaFactor AdaGC AdaMax AdaMod AdaNorm
        AdaPNM AdaSmooth AdaTAM Adai Adalite AdamC AdamG AdamP AdamS AdamWSN Adan AggMo Aida Alice Amos Ano ApolloDQN
        AvaGrad BCOS CAME Conda DASH DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD DiffGrad DualAdam EXAdam EmoFact EmoLynx
        EmoNavi FOCUS FTRL Fira FlashAdamW Fromage GaLore Grams Gravity GrokFastAdamW Kate LARS LaProp Lamb Lion
        MADGRAD MARS MSVAG Nero NovoGrad PAdam PID PNM Prodigy QHAdam QHM RACS ROSE Ranger SCION SCIONLight SGDP
        SGDSaI SGDW SM3 SOAP SPAM SPlus SRMM SWATS ScalableShampoo ScheduleFreeAdamW Shampoo SignSGD SimplifiedAdEMAMix
        StableAdamW StableSPAM TAM Tiger VSGD Yogi""",
    "torch_optimizer": """
        A2GradExp A2GradInc A2GradUni AccSGD AdaBelief AdaBound AdaMod Adafactor AdamP AggMo Apollo DiffGrad LARS Lamb
        MADGRAD NovoGrad PID QHAdam QHM RAdam Ranger RangerQH RangerVA SGDP SGDW SWATS Shampoo Yogi""",
    "heavyball": """
        ADOPT AdEMAMix AdamC AdamW HyperBallAdamW LaProp LaPropOrtho Muon MuonAdamW MuonLaProp NAdam OrthoLaProp PSGDLRA
        RMSprop SFAdamW SGD SUDSAdamW Scion SignLaProp UnscaledAdamW""",
    "schedulefree": "AdamWScheduleFree AdamWScheduleFreePaper",
    "madgrad": "MADGRAD MirrorMADGRAD",
    "prodigyopt": "Prodigy",
    "dadaptation": "DAdaptAdam DAdaptAdan DAdaptLion",
    "lion_pytorch": "Lion",
    "adan_pytorch": "Adan",
    "grokadamw": "GrokAdamW",
    "transformers.optimization": "Adafactor",
}
FLOAT32 = {  # what takes no other
    "heavyball": """
        HeavyKLSOAP HeavyKLShampoo HeavySOAP HeavySOAPAdEMAMix HeavySOAPNAdam HeavySOLP KLSOAP KLShampoo LATHER PSGDKron
        PSGDPRO QSGD SOAP SOAPAdEMAMix SOAPNAdam SOLP""",
    "pytorch_optimizer": "FAdam Kron",
    "bitsandbytes.optim": "Adagrad Adam AdamW LAMB Lion RMSprop PagedAdam PagedAdamW PagedLion",
    "prodigyplus": "ProdigyPlusScheduleFree",
}
LOW_BIT = {  # of matrices of 4096 entries on, by blocks of 256
    "bitsandbytes.optim": """
        AdEMAMix AdEMAMix8bit Adagrad8bit Adam8bit AdamW8bit LAMB8bit Lion8bit RMSprop8bit PagedAdEMAMix
        PagedAdEMAMix8bit PagedAdam8bit PagedAdamW8bit PagedLion8bit""",
    "torchao.optim": "Adam4bit Adam8bit AdamFp8 AdamW4bit AdamW8bit AdamWFp8 _AdamW",
}

# -------------------------------------------------------------------------------------------- with options of their own

SPECIAL = [
    Kind("torch.optim", "Muon", shapes=MATRICES),
    Kind("torch.optim", "AdamW numpy rate", {"lr": np.float64(1e-3)}),  # as numpy's interpolation sets it
    Kind("torch.optim", "AdamW tensor rate", {"lr": torch.tensor(1e-3), "foreach": False}),
    Kind("pytorch_optimizer", "AdaGO", given=muon_groups),
    Kind("pytorch_optimizer", "AdaMuon", given=muon_groups),
    Kind("pytorch_optimizer", "AdaShift", {"keep_num": 2}),
    Kind("pytorch_optimizer", "AdamMini", {"lr": 1e-3}, given=Model),
    Kind("pytorch_optimizer", "APOLLO low rank", given=low_rank(projection_type="random", scale_type="channel")),
    Kind("pytorch_optimizer", "FlashAdamW masters", {"master_weight_bits": 32}, dtype=BF16, shapes=SQUARES),
    Kind("pytorch_optimizer", "GaLore low rank", given=low_rank(projection_type="std")),
    Kind("pytorch_optimizer", "Fira low rank", given=low_rank(projection_type="std")),
    Kind("pytorch_optimizer", "LoRARite", {"update_skipping": 0.0}, shapes=LORA),
    Kind("pytorch_optimizer", "Muon", given=muon_groups),
    Kind("pytorch_optimizer", "MuonClip", given=muon_groups),
    Kind("pytorch_optimizer", "NorMuon", given=muon_groups),
    Kind("pytorch_optimizer", "RAdam", {"degenerated_to_sgd": True}),  # without it the first steps are none
    Kind("pytorch_optimizer", "Ranger21", {"num_iterations": 100}),
    Kind("pytorch_optimizer", "SaRA", {"lr": 1e-3, "threshold": 10.0}),
    Kind("pytorch_optimizer", "ScheduleFreeRAdam", {"lr": 0.01, "betas": (0.9, 0.9)}),
    Kind("pytorch_optimizer", "ScheduleFreeSGD", {"lr": 0.01}),
    Kind("pytorch_optimizer", "SpectralSphere", {"solver_max_iterations": 5}, shapes=MATRICES),
    Kind("pytorch_optimizer", "StableAdamW kahan", dtype=BF16),
    Kind("heavyball", "AdamW ecc", {"ecc": "bf16+8"}, F32),  # what rounding to bfloat16 takes away is kept beside
    Kind("heavyball", "AdamW param_ecc", {"param_ecc": "bf16+8"}, F32),
    Kind("schedulefree", "RAdamScheduleFree", {"silent_sgd_phase": False}),
    Kind("schedulefree", "SGDScheduleFree", {"lr": 0.01}),
    Kind("madgrad", "MADGRAD without momentum", {"momentum": 0.0}),
    Kind("came_pytorch", "CAME", {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999)}),
    Kind("adam_mini", "Adam_mini", {"dim": 4, "n_heads": 2}, given=named),
    Kind("ranger21", "Ranger21", {"lr": 1e-3, "num_epochs": 10, "num_batches_per_epoch": 10, "logging_active": False}),
    Kind("ranger21", "Ranger21abel", {"lr": 1e-3, "num_epochs": 10, "num_batches_per_epoch": 10}),
    Kind("muon", "SingleDeviceMuon", shapes=MATRICES),
    Kind("muon", "SingleDeviceMuonWithAuxAdam", given=muon_groups),
    Kind("galore_torch", "GaLoreAdamW", given=low_rank(proj_type="std")),
    Kind("galore_torch", "GaLoreAdafactor", given=low_rank(proj_type="std")),
    Kind("torchao.optim", "AdamW8bit stochastic rounding", {"bf16_stochastic_round": True}, dtype=BF16, shapes=SQUARES),
    *(
        Kind("optimi", name, {"lr": 1e-3})
        for name in ("Adam", "AdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD", "StableAdamW")
    ),
    *(
        Kind("optimi", f"{name} kahan", {"lr": 1e-3, "kahan_sum": True}, BF16)
        for name in ("AdamW", "Lion", "Ranger", "StableAdamW")
    ),
    *(
        Kind("bitsandbytes.optim", name, {"lr": 1e-3, "momentum": 0.9}, F32, SQUARES if "8" in name else BOTH)
        for name in ("LARS", "LARS8bit", "LARS32bit", "SGD", "SGD8bit", "SGD32bit")
    ),
]


def of_table(table: dict[str, str], **rest: Any) -> list[Kind]:
    return [Kind(package, name, **rest) for package, names in table.items() for name in names.split()]


KINDS = [
    *of_table(AS_THEY_COME),
    *of_table(FLOAT32, dtype=F32),
    *of_table(LOW_BIT, dtype=F32, shapes=SQUARES),
    *SPECIAL,
]

# --------------------------------------------------------------------- refused: weights computed from a copy of its own

OWN_COPY = [  # what it writes does not depend on where the parameters are
    Kind("pytorch_optimizer", "DAdaptAdaGrad"),
    Kind("dadaptation", "DAdaptAdaGrad"),
    Kind("dadaptation", "DAdaptSGD"),
    Kind("heavyball", "MSAMLaProp"),
    Kind("schedulefree", "AdamWScheduleFreeReference"),
    Kind("schedulefree", "SGDScheduleFreeReference", {"lr": 0.01}),
]

# --------------------------------------------------------------------- refused: around another, or by their own closure


def sgd(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01)


WRAPPERS = [
    *(
        Kind("pytorch_optimizer", name, given=sgd)
        for name in ("Lookahead", "Magma", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper", "TRAC")
    ),
    Kind("torch_optimizer", "Lookahead", given=sgd),
]

AROUND = {"base_optimizer": torch.optim.SGD, "lr": 0.01}
CLOSURES = [  # several gradients a step, at points of their own choice, or the loss itself
    Kind("torch.optim", "LBFGS"),
    Kind("pytorch_optimizer", "AliG", {"max_lr": 0.01}),
    Kind("pytorch_optimizer", "BSAM", {"num_data": 10}),
    Kind("pytorch_optimizer", "FriendlySAM", AROUND),
    Kind("pytorch_optimizer", "LookSAM", AROUND),
    Kind("pytorch_optimizer", "SAM", AROUND),
    Kind("schedulefree", "AdamWScheduleFreeClosure"),
    Kind("schedulefree", "RAdamScheduleFreeClosure"),
    Kind("schedulefree", "SGDScheduleFreeClosure"),
    Kind("heavyball", "SAMWrapper"),
]

# ------------------------------------------------------------------------------------------------------------- left out

SECOND_ORDER = "differentiates the gradient, which needs backward(create_graph=True)"
IN_BACKWARD = "steps during backward, in hooks, and leaves no gradients"
ON_RANKS = "needs a process group"
ON_CUDA = "runs on CUDA only"
NO_OPTIMIZER = "is what others inherit from"

LEFT_OUT = {
    "torch.optim": {"Optimizer": NO_OPTIMIZER, "SparseAdam": "takes sparse gradients only, which GXPO refuses"},
    "pytorch_optimizer": {
        "AdaHessian": SECOND_ORDER,
        "AdaLOMO": IN_BACKWARD,
        "DeMo": f"{ON_RANKS} and einops",
        "DistributedMuon": ON_RANKS,
        "GSAM": "wants a closure, as SAM, and a scheduler and a model that it switches",
        "LOMO": IN_BACKWARD,
        "SophiaH": SECOND_ORDER,
        "WSAM": "wants a closure, as SAM, and a model",
    },
    "torch_optimizer": {"Adahessian": SECOND_ORDER},
    "heavyball": {
        "PSGDBase": NO_OPTIMIZER,
        "SOAPBase": NO_OPTIMIZER,
        "SplitOpt": "is made of optimizers for parts of the parameters, each of which is here",
    },
    "bitsandbytes.optim": {
        "AdEMAMix32bit": "does not step on a matrix that is not square: its own fault, on a CPU",
        "PagedAdEMAMix32bit": "as AdEMAMix32bit",
        "PytorchLARS": "fails in its first step",
        **{
            f"{name}32bit": "is the class without 32bit"
            for name in ("Adagrad", "Adam", "AdamW", "LAMB", "Lion", "RMSprop", "PagedAdam", "PagedAdamW", "PagedLion")
        },
    },
    "torchao.optim": {"CPUOffloadOptimizer": ON_CUDA},
    "galore_torch": {"GaLoreAdamW8bit": ON_CUDA},
    "muon": {"Muon": ON_RANKS, "MuonWithAuxAdam": ON_RANKS},
    "prodigyplus": {"CoreOptimiser": NO_OPTIMIZER},
    "transformers.optimization": {"LayerWiseDummyOptimizer": "does nothing"},
}
