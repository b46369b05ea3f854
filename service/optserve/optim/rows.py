"""The rows of the catalogue: torch's own, friendly aliases, and what passes the conformance gate."""

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
    A2Grad ADOPT APOLLO AccSGD AdEMAMix AdaBelief AdaBound AdaGC AdaMod AdaNorm AdaPNM AdaSmooth
    AdaTAM Adai Adalite AdamC AdamG AdamP AdamS AdamWSN Adan AggMo Aida Alice Amos Ano ApolloDQN
    AvaGrad BCOS CAME DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD DiffGrad DualAdam
    EXAdam EmoFact EmoLynx EmoNavi FAdam FOCUS FTRL Fira FlashAdamW GaLore Grams GrokFastAdamW Kate
    LARS LaProp Lamb Lion MARS MSVAG NovoGrad PAdam PID PNM Prodigy QHAdam QHM RACS ROSE Ranger
    Ranger21 SCION SCIONLight SGDP SGDSaI SGDW SM3 SOAP SPAM SPlus SRMM ScheduleFreeAdamW
    ScheduleFreeRAdam ScheduleFreeSGD Shampoo SignSGD SimplifiedAdEMAMix SpectralSphere StableAdamW
    TAM Tiger VSGD Yogi
""".split()

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
