"""Four optimizers on f(x, y) = x²/20 + y² from (-7, 2), side by side.

scripts/serve &
.venv/bin/python examples/compare_optimizers.py http://127.0.0.1:8000
"""

from __future__ import annotations

import sys

import numpy as np

from optserve_client import Client

LEARNING_RATES = {"SGD": 0.95, "Momentum": 0.1, "Adagrad": 1.5, "Adam": 0.3}
STEPS = 30
BARS = " ▁▂▃▄▅▆▇█"


def f(p: np.ndarray) -> float:
    return float(p[0] ** 2 / 20 + p[1] ** 2)


def gradient(p: np.ndarray) -> np.ndarray:
    return np.array([p[0] / 10, 2 * p[1]])


def curve(losses: list[float]) -> str:
    """Return the losses as a line of bars on a logarithmic scale from 1e-4 to 10."""
    heights = (np.log10(np.clip(losses, 1e-4, 10)) + 4) / 5 * (len(BARS) - 1)
    return "".join(BARS[round(height)] for height in heights)


def main(url: str) -> None:
    with Client(url) as client:
        for name, lr in LEARNING_RATES.items():
            p = np.array([-7.0, 2.0])
            session = client.create(name, {"p": p}, lr=lr, name=name, tags={"run": "compare"})
            for _ in range(STEPS):
                p = session.step({"p": gradient(p)}, loss=f(p)).params["p"]
            losses = [row["loss"] for row in session.history()]
            print(f"{name:9} {curve(losses)}  f = {f(p):.6f} at ({p[0]:+.3f}, {p[1]:+.3f})")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
