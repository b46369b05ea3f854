"""Train a digit classifier through optserve, with numpy alone, and compare with torch run locally.

    scripts/demo                                     starts a server and runs this file
    python examples/demo_digits.py http://HOST:PORT  against a server that runs already

The gradients are computed here, in numpy, without torch in the process. AdamW and the schedule of
the learning rate live on the server. Afterwards the same training runs on local torch, from the
same start and over the same batches, and the two sets of parameters are compared bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from optserve_client import Client

EPOCHS = 30
BATCH = 64
LR = 3e-3
WEIGHT_DECAY = 0.01
WANTED_ACCURACY = 0.95

Params = dict[str, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Digits:
    """1,797 scans of 8 x 8 pixels, scaled to [0, 1], a fifth of them kept for the test."""

    train_x: np.ndarray
    test_x: np.ndarray
    train_y: np.ndarray
    test_y: np.ndarray

    @classmethod
    def load(cls) -> Digits:
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype(np.float32)
        return cls(
            *train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
        )

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of all epochs, shuffled anew, and the same ones every time."""
        random = np.random.default_rng(0)
        for _ in range(EPOCHS):
            order = random.permutation(len(self.train_x))
            for at in range(0, len(order), BATCH):
                chosen = order[at : at + BATCH]
                yield self.train_x[chosen], self.train_y[chosen]

    @property
    def steps(self) -> int:
        return EPOCHS * -(-len(self.train_x) // BATCH)


def initial_params() -> Params:
    random = np.random.default_rng(1)

    def layer(inputs: int, outputs: int) -> np.ndarray:
        return random.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(np.float32)

    return {
        "hidden.weight": layer(64, 128),
        "hidden.bias": np.zeros(128, np.float32),
        "output.weight": layer(128, 10),
        "output.bias": np.zeros(10, np.float32),
    }


def forward(params: Params, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the activations of the hidden layer and the ten probabilities of each row of ``x``."""
    hidden = np.maximum(x @ params["hidden.weight"] + params["hidden.bias"], 0)
    logits = hidden @ params["output.weight"] + params["output.bias"]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, powers / powers.sum(axis=1, keepdims=True)


def loss_and_grads(params: Params, batch: Batch) -> tuple[float, Params]:
    """Return the mean cross entropy of ``batch`` and its gradient, by hand."""
    x, y = batch
    hidden, probabilities = forward(params, x)
    rows = np.arange(len(x))
    loss = -float(np.log(probabilities[rows, y]).mean())
    delta = probabilities
    delta[rows, y] -= 1
    delta /= np.float32(len(x))
    hidden_delta = (delta @ params["output.weight"].T) * (hidden > 0)
    return loss, {
        "hidden.weight": x.T @ hidden_delta,
        "hidden.bias": hidden_delta.sum(axis=0),
        "output.weight": hidden.T @ delta,
        "output.bias": delta.sum(axis=0),
    }


def accuracy(params: Params, digits: Digits) -> float:
    return float((forward(params, digits.test_x)[1].argmax(axis=1) == digits.test_y).mean())


Report = Callable[[int, float, float], None]


def train_served(client: Client, digits: Digits, report: Report) -> tuple[Params, str, str]:
    """Return the trained params, the session's id and the line of torch that it stands for."""
    params = initial_params()
    session = client.create(
        {"name": "AdamW", "lr": LR, "weight_decay": WEIGHT_DECAY},
        params,
        scheduler={"name": "CosineAnnealingLR", "T_max": digits.steps, "advance": "step"},
        name="digits",
    )
    for number, batch in enumerate(digits.batches(), start=1):
        loss, grads = loss_and_grads(params, batch)
        result = session.step(grads, loss=loss)
        params = result.params
        report(number, loss, result.groups[0]["lr"])
    return params, session.id, session.info["torch"]


def train_locally(digits: Digits, torch_line: str, threads: int) -> Params:
    """Do the same with torch in this process, with the implementation that the server named."""
    import torch

    torch.set_num_threads(threads)
    tensors = {name: torch.from_numpy(value) for name, value in initial_params().items()}
    impl = {flag: True for flag in ("fused", "foreach") if f"{flag}=True" in torch_line}
    optimizer = torch.optim.AdamW(tensors.values(), lr=LR, weight_decay=WEIGHT_DECAY, **impl)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=digits.steps)
    params = {name: tensor.numpy() for name, tensor in tensors.items()}  # views: they move along
    for batch in digits.batches():
        _, grads = loss_and_grads(params, batch)
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(grads[name])
        optimizer.step()
        scheduler.step()
    return params


def show_curl(console: Console, url: str) -> None:
    """Print, and run, the three lines that do the same without any Python."""
    header = "-H 'Content-Type: application/json'"
    create = json.dumps({"optimizer": {"name": "AdamW", "lr": 0.1}, "params": {"w": [1.0, -2.0]}})
    step = json.dumps({"grads": {"w": [0.5, -1.0]}})
    session = f"{url}/v1/sessions/by-hand"
    lines = [
        f"curl -s -X PUT {session} {header} -d '{create}'",
        f"curl -s {session}/step {header} -d '{step}'",
        f"curl -s {session}/params",
    ]
    console.print("\nThe same with curl:")
    for line in lines:
        console.print(f"  $ {line}")
        if shutil.which("curl"):
            done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
            console.print(f"    {done.stdout.strip()}")


def main(url: str) -> int:
    started = float(os.environ.get("OPTSERVE_DEMO_STARTED") or time.time())
    console = Console(soft_wrap=True, highlight=False, markup=False)
    digits = Digits.load()
    console.print(
        f"digits: {len(digits.train_x)} scans to train on, {len(digits.test_x)} to test; "
        f"{digits.steps} steps of AdamW with CosineAnnealingLR"
    )
    progress = Progress(
        TextColumn("training through the server"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with Client(url) as client, progress:
        task = progress.add_task("", total=digits.steps, status="")

        def report(number: int, loss: float, lr: float) -> None:
            if number == 1:
                console.print(f"first step {time.time() - started:.1f} s after the start")
            status = f"loss {loss:.4f}  lr {lr:.6f}"
            progress.update(task, completed=number, status=status)
            if not console.is_terminal and number % (digits.steps // 10) == 0:
                console.print(f"step {number}/{digits.steps}  {status}")

        before = time.perf_counter()
        served, session_id, torch_line = train_served(client, digits, report)
        seconds = time.perf_counter() - before
        threads = client.version()["threads"]
    assert "torch" not in sys.modules, "the client must not need torch"
    console.print(
        f"{digits.steps} steps in {seconds:.1f} s, {1000 * seconds / digits.steps:.1f} ms each, "
        f"no torch in this process; session {session_id}"
    )
    reached = accuracy(served, digits)
    console.print(f"test accuracy {reached:.2%} (wanted: {WANTED_ACCURACY:.0%})")

    console.print(f"now the same with local torch: {torch_line}")
    local = train_locally(digits, torch_line, threads)
    largest = max(float(np.abs(served[name] - local[name]).max()) for name in served)
    console.print(f"largest difference between the two sets of parameters: {largest:g}")
    show_curl(console, url)
    return 0 if reached >= WANTED_ACCURACY and largest == 0 else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} http://HOST:PORT")
    sys.exit(main(sys.argv[1]))
