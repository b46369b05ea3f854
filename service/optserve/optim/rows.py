"""The rows of the catalogue: torch's own, friendly aliases, what passes the conformance gate."""

from __future__ import annotations

from optserve.optim.catalogue import Entry
from optserve.optim.lookahead import LookaheadEntry

_TORCH = (
    Entry(name="SGD", source="torch.optim.SGD", sparse="allowed"),
    Entry(name="Adam", source="torch.optim.Adam"),
    Entry(name="AdamW", source="torch.optim.AdamW"),
    Entry(name="Adagrad", source="torch.optim.Adagrad", sparse="allowed"),
    Entry(name="RMSprop", source="torch.optim.RMSprop"),
    Entry(name="Adadelta", source="torch.optim.Adadelta"),
    Entry(name="Adafactor", source="torch.optim.Adafactor"),
    Entry(name="Adamax", source="torch.optim.Adamax"),
    Entry(name="NAdam", source="torch.optim.NAdam"),
    Entry(name="RAdam", source="torch.optim.RAdam"),
    Entry(name="ASGD", source="torch.optim.ASGD"),
    Entry(name="Rprop", source="torch.optim.Rprop"),
    Entry(name="Muon", source="torch.optim.Muon"),
    Entry(name="SparseAdam", source="torch.optim.SparseAdam", sparse="only"),
    Entry(name="LBFGS", source="torch.optim.LBFGS", needs_loss=True, groups=False),
)

_FRIENDLY = (
    Entry(
        name="Momentum",
        source="torch.optim.SGD",
        defaults={"momentum": 0.9},
        sparse="allowed",
        meaning="SGD whose momentum is 0.9 unless given",
    ),
    Entry(
        name="Nesterov",
        source="torch.optim.SGD",
        defaults={"momentum": 0.9},
        fixed={"nesterov": True},
        sparse="allowed",
        meaning="SGD with nesterov=True, whose momentum is 0.9 unless given",
    ),
    Entry(
        name="AMSGrad",
        source="torch.optim.Adam",
        fixed={"amsgrad": True},
        meaning="Adam with amsgrad=True",
    ),
)

#: Classes of pytorch_optimizer that pass the conformance gate.
CONFORMING = """
    ADOPT APOLLO AccSGD AdEMAMix AdaBelief AdaBound AdaGC AdaMod AdaNorm AdaPNM AdaSmooth AdaTAM
    Adai Adalite AdamC AdamG AdamP AdamS AdamWSN Adan AggMo Aida Amos Ano ApolloDQN AvaGrad BCOS
    CAME DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD DiffGrad DualAdam EXAdam
    EmoFact EmoLynx EmoNavi FAdam FOCUS FTRL Fira FlashAdamW GaLore Grams GrokFastAdamW Kate
    LARS LaProp Lamb Lion MARS MSVAG NovoGrad PAdam PID PNM Prodigy QHAdam QHM RACS ROSE Ranger
    Ranger21 SCION SCIONLight SGDP SGDSaI SGDW SM3 SOAP SPAM SPlus SRMM SaRA ScheduleFreeAdamW
    ScheduleFreeRAdam ScheduleFreeSGD Shampoo SignSGD SimplifiedAdEMAMix SpectralSphere
    StableAdamW StableSPAM TAM Tiger VSGD Yogi
""".split()  # noqa: SIM905 - a hundred quotes would hide the names

#: The others, and why not.
_MODEL = "needs the model, not only its gradients"
_CLOSURE = "evaluates the loss itself, with a closure or second derivatives"
_WRAPPER = "wraps another optimizer in a way of its own"
_RANDOM = "draws random numbers whose state is not saved"
_UNSAVED = "keeps state that is neither a tensor nor plain data"
_TORCHS = "torch.optim has it"
EXCLUDED: dict[str, str] = {
    "A2Grad": "has no learning rate",
    **dict.fromkeys(("AdaGO", "AdaMuon", "DistributedMuon", "MuonClip", "NorMuon"), _MODEL),
    **dict.fromkeys(("AdaLOMO", "AdamMini", "LOMO", "LoRARite"), _MODEL),
    **dict.fromkeys(("AdaHessian", "AliG", "SophiaH"), _CLOSURE),
    **dict.fromkeys(("BSAM", "FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM"), _CLOSURE),
    **dict.fromkeys(("OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper"), _WRAPPER),
    "TRAC": _WRAPPER,
    **dict.fromkeys(("Alice", "Gravity", "Kron", "Magma"), _RANDOM),
    **dict.fromkeys(("AdaShift", "Conda", "MADGRAD", "ScalableShampoo"), _UNSAVED),
    "DASH": "steps in other last bits where its params are views of one buffer",
    "DeMo": "needs a package that optserve does not",
    **dict.fromkeys(("Fromage", "Nero"), "has a non-commercial licence"),
    **dict.fromkeys(("ASGD", "AdaDelta", "AdaFactor", "AdaMax", "Adam", "AdamW"), _TORCHS),
    **dict.fromkeys(("LBFGS", "Muon", "NAdam", "RAdam", "RMSprop", "SGD"), _TORCHS),
}

_LIBRARY = tuple(
    Entry(
        name=name,
        source=f"pytorch_optimizer.{name}",
        eval_weights=name.startswith("ScheduleFree"),
        aliases=("ScheduleFree",) if name == "ScheduleFreeAdamW" else (),
    )
    for name in CONFORMING
)

_OURS = (
    Entry(
        name="SWATS",
        source="optserve.optim.swats.SWATS",
        meaning="Adam that switches to SGD; switch_tol is the tolerance of the switch alone",
    ),
    LookaheadEntry(
        name="Lookahead",
        source="pytorch_optimizer.Lookahead",
        meaning="slow weights that follow another optimizer's fast ones",
    ),
)

ROWS: tuple[Entry, ...] = (*_TORCH, *_FRIENDLY, *_OURS, *_LIBRARY)
