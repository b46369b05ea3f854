"""The classes of pytorch_optimizer that conform, and why the others are left out.

The tables are fixed so that looking a name up imports nothing; a test runs the gate over every
class of the library and compares, so that an upgrade shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optserve.optim.entry import Entry

#: Classes that pass the gate as they are, and nothing more is to be said of them.
_PLAIN = (
    "ADOPT", "AccSGD", "AdEMAMix", "AdaBelief", "AdaGC", "AdaMod", "AdaNorm", "AdaPNM",
    "AdaSmooth", "AdaTAM", "Adai", "Adalite", "AdamC", "AdamG", "AdamP", "AdamS", "AdamWSN",
    "AggMo", "Aida", "Amos", "Ano", "ApolloDQN", "AvaGrad", "BCOS", "CAME", "DAdaptAdaGrad",
    "DAdaptAdam", "DAdaptLion", "DAdaptSGD", "DiffGrad", "DualAdam", "EXAdam", "FAdam", "FOCUS",
    "FTRL", "Grams", "GrokFastAdamW", "Kate", "LARS", "LaProp", "Lamb", "Lion", "MARS", "MSVAG",
    "NovoGrad", "PAdam", "PID", "PNM", "Prodigy", "QHAdam", "QHM", "RACS", "Ranger", "SCION",
    "SGDP", "SGDSaI", "SGDW", "SM3", "SOAP", "SRMM", "Shampoo", "SignSGD", "SimplifiedAdEMAMix",
    "SpectralSphere", "StableAdamW", "StableSPAM", "TAM", "Tiger", "VSGD", "Yogi",
)  # fmt: skip

#: What there is to say of the rest.
_SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "AdaBound": {"source": "optserve.optim.adabound.AdaBound"},
    # Its maximize flips the gradient after part of it has been used.
    "Adan": {"leave_out": frozenset({"maximize"})},
    "DAdaptAdan": {"leave_out": frozenset({"maximize"})},
    # Its options for 16-bit weights and checkpoints of its own; quantized moments are the class.
    "FlashAdamW": {
        "leave_out": frozenset(
            {"fused", "check_numerics", "compress_state_dict", "master_weight_bits"}
        )
    },
    # Stochastic rounding draws random numbers whose state is not saved.
    "ROSE": {"fixed": {"bf16_sr": False}},
    "Ranger21": {"example": {"num_iterations": 1000}},
    "SPlus": {"eval_weights": True},
    "SWATS": {
        "source": "optserve.optim.swats.SWATS",
        "meaning": "Adam that switches to SGD; switch_tol is the tolerance of the switch alone",
    },
    "ScheduleFreeAdamW": {"eval_weights": True, "aliases": ("ScheduleFree",)},
    "ScheduleFreeRAdam": {"eval_weights": True},
    "ScheduleFreeSGD": {"eval_weights": True},
}

#: Group hyperparameters that the state is laid out by, or that are read only when it is made.
_FROZEN: Mapping[str, tuple[str, ...]] = {
    "AdamWSN": ("subset_size",),
    "AggMo": ("betas",),
    "Amos": ("momentum",),
    "ApolloDQN": ("rebound",),
    "FlashAdamW": ("quantize",),
    "LaProp": ("centered",),
    "MARS": ("mars_type",),
    "Prodigy": ("d0",),
    "ROSE": ("compute_dtype", "wd_schedule"),
    "SCION": ("norm_type",),
    "SOAP": ("max_precondition_dim", "merge_dims", "precondition_1d"),
    "SPlus": ("max_dim",),
    "StableAdamW": ("kahan_sum",),
    "Yogi": ("initial_accumulator",),
}

_TORCHS = "torch.optim has it"
_LICENCE = "has a non-commercial licence"
_LOSS = "needs the loss or its second derivatives, through a closure"
_MODEL = "needs the model, not only its params"
_WRAPPER = "wraps an optimizer or gradients of several losses in a way of its own"
_RANK = "is AdamW unless a group has a rank, and then keeps an object that cannot be saved"
_RANDOM = "draws random numbers whose state is not saved"
_OBJECT = "keeps an object that cannot be saved"
_USE_MUON = "wants each group marked use_muon, an option outside its constructor"
#: Left out for what the gate cannot see.
BY_HAND: Mapping[str, str] = {
    **dict.fromkeys(("Fromage", "Nero"), _LICENCE),
    **dict.fromkeys(("ASGD", "AdaDelta", "AdaFactor", "AdaMax", "Muon", "RAdam"), _TORCHS),
    **dict.fromkeys(("Adam", "AdamW", "LBFGS", "NAdam", "RMSprop", "SGD"), _TORCHS),
    **dict.fromkeys(("EmoFact", "EmoLynx", "EmoNavi"), _LOSS),
    **dict.fromkeys(("APOLLO", "Fira", "GaLore"), _RANK),
    **dict.fromkeys(("FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM"), _LOSS),
    **dict.fromkeys(("OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper"), _WRAPPER),
    "TRAC": _WRAPPER,
    "SCIONLight": "keeps its momentum in the gradients, which a session makes anew",
}
#: Left out because the gate says no.
BY_GATE: Mapping[str, str] = {
    "A2Grad": "has no lr in its groups",
    "AdaShift": "fails at a later step, not its first, on an empty parameter",
    "SaRA": "does not move params that start above its threshold",
    "ScalableShampoo": _OBJECT,
    "Conda": _OBJECT,
    "DeMo": "needs the package einops and a process group",
    "MADGRAD": "keeps its step count where only its own state_dict finds it",
    **dict.fromkeys(("Alice", "DASH", "Gravity", "Kron", "Magma", "SPAM"), _RANDOM),
    **dict.fromkeys(("AdaHessian", "AliG", "BSAM", "SophiaH"), _LOSS),
    **dict.fromkeys(("AdaLOMO", "AdamMini", "LOMO", "LoRARite"), _MODEL),
    **dict.fromkeys(("AdaGO", "AdaMuon", "DistributedMuon", "MuonClip", "NorMuon"), _USE_MUON),
}
EXCLUDED: Mapping[str, str] = {**BY_HAND, **BY_GATE}


def _entry(name: str) -> Entry:
    special = {"source": f"pytorch_optimizer.{name}", **_SPECIAL.get(name, {})}
    return Entry(name=name, frozen=frozenset({"ams_bound", *_FROZEN.get(name, ())}), **special)


CONFORMING = tuple(sorted([*_PLAIN, *_SPECIAL], key=str.lower))
THIRD_PARTY: tuple[Entry, ...] = tuple(_entry(name) for name in CONFORMING)
