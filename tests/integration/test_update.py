"""The arithmetic of one update and its order, with torch itself as the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from optserve.sessions.registry import Registry
from optserve_client import wire
from optserve_client.errors import Conflict, Invalid, Nonfinite, VersionConflict
from tests import local
from tests.local import arrays, assert_equal, create, exported, params_of, step

ADAM = {"optimizer": {"name": "Adam", "lr": 0.1}, "impl": "single"}
SGD = {"optimizer": {"name": "SGD", "lr": 0.5}, "impl": "single"}


@pytest.fixture
def made() -> Iterator[Registry]:
    with local.registry() as registry:
        yield registry


def test_ema_is_torchs_averaged_model(made: Registry) -> None:
    params = arrays(1)
    session = create(made, {**ADAM, "ema": {"decay": 0.9}}, params)
    model = torch.nn.ParameterDict(local.leaves(params))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.Adam(model.values(), lr=0.1, foreach=False)
    for seed in range(2, 8):
        local.set_grads(model, arrays(seed))
        step(session, arrays(seed))
        optimizer.step()
        average.update_parameters(model)
    ema = session.published("ema").result(10)
    assert_equal(ema.arrays(), {name: average.module[name] for name in params})


def test_ema_of_bfloat16_averages_in_float32(made: Registry) -> None:
    params = {"w": wire.Bits.bfloat16(arrays(1)["w"])}
    session = create(made, {**SGD, "ema": {"decay": 0.999}}, params)
    leaf = torch.nn.Parameter(torch.tensor(params["w"].to_float32()).bfloat16())
    optimizer = torch.optim.SGD([leaf], lr=0.5, foreach=False)
    average = None
    for seed in range(20):
        grad = wire.Bits.bfloat16(arrays(seed)["w"])
        step(session, {"w": grad})
        leaf.grad = torch.tensor(grad.to_float32()).bfloat16()
        optimizer.step()
        wide = leaf.detach().float()
        average = wide.clone() if average is None else average.lerp_(wide, 1 - 0.999)
    assert average is not None
    assert_equal(session.published("ema").result(10).arrays(), {"w": average.bfloat16()})
    assert local.read_back(session) == exported(session)


def test_sparse_gradients_accumulate(made: Registry) -> None:
    session = create(made, {**SGD, "sparse": ["w"], "accumulate": 2}, {"w": arrays(1)["w"]})
    total = torch.zeros(5, 7)
    for rows in ([0, 2], [2, 4]):
        values = np.ones((2, 7), "f4") * (rows[0] + 1)
        grad = {"indices": [rows], "values": values.tolist(), "shape": [5, 7]}
        request = session.step_from_json({"grads": {"w": grad}}, b"")
        reply = session.step(request, local.NOBODY).result(10)
        assert local.read_back(session) == exported(session)
        total.index_add_(0, torch.tensor(rows), torch.tensor(values))
    leaf = torch.nn.Parameter(torch.tensor(arrays(1)["w"]))
    leaf.grad = total
    torch.optim.SGD([leaf], lr=0.5, foreach=False).step()
    assert_equal(params_of(reply), {"w": leaf})


def test_ema_goes_on_after_export_and_import(made: Registry) -> None:
    session = create(made, {**SGD, "ema": {"decay": 0.9}}, arrays(1))
    for seed in range(2):
        step(session, arrays(seed))
    made.import_session("default", "copy", exported(session), local.NOBODY).result(10)
    averages = []
    for one in (session, made.get("default", "copy")):
        step(one, arrays(5))
        averages.append(one.published("ema").result(10).arrays())
    live = session.published().result(10).arrays()
    assert all(np.array_equal(averages[0][n], averages[1][n]) for n in live)
    assert not np.array_equal(averages[1]["w"], live["w"])


def test_ema_is_the_params_before_the_first_update(made: Registry) -> None:
    params = arrays(1)
    session = create(made, {**ADAM, "ema": {"decay": 0.9}}, params)
    assert_equal(session.published("ema").result(10).arrays(), local.leaves(params))


def test_best_keeps_the_params_at_which_the_loss_was_taken(made: Registry) -> None:
    session = create(made, {**SGD, "best": {"monitor": "loss"}}, arrays(1))
    seen = []
    for seed, loss in enumerate([3.0, 1.0, 2.0, 1.5]):
        seen.append(session.published().result(10).arrays())
        step(session, arrays(seed), loss=loss)
    best = session.published("best").result(10).arrays()
    assert all(np.array_equal(best[name], seen[1][name]) for name in best)
    assert session.status().result(10)["best"] == {"value": 1.0, "version": 1}


def test_the_tag_of_best_changes_with_best(made: Registry) -> None:
    session = create(made, {**SGD, "best": {"monitor": "acc", "mode": "max"}}, arrays(1))
    step(session, arrays(2), metrics={"acc": 0.5})
    before = session.published("best").result(10)
    local.put_metrics(session, 1, {"acc": 0.9}, local.NOBODY).result(10)
    after = session.published("best").result(10)
    assert not np.array_equal(before.data, after.data)
    assert before.etag("list", "float32") != after.etag("list", "float32")
    assert before.version == after.version == 1


def test_best_follows_a_metric_upwards(made: Registry) -> None:
    session = create(made, {**SGD, "best": {"monitor": "acc", "mode": "max"}}, arrays(1))
    for seed, acc in enumerate([0.5, 0.9, 0.7]):
        step(session, arrays(seed), metrics={"acc": acc})
    assert session.status().result(10)["best"] == {"value": 0.9, "version": 1}


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_accumulate_is_torchs_accumulation_of_grad(made: Registry, reduce: str) -> None:
    params = arrays(1)
    session = create(made, {**ADAM, "accumulate": {"steps": 3, "reduce": reduce}}, params)
    leaves = local.leaves(params)
    optimizer = torch.optim.Adam(leaves.values(), lr=0.1, foreach=False)
    for window in range(3):
        for name, leaf in leaves.items():
            total = None
            for i in range(3):
                grad = torch.tensor(arrays(window * 3 + i)[name])
                total = grad if total is None else total + grad
            leaf.grad = total / 3 if reduce == "mean" else total
        optimizer.step()
        replies = [step(session, arrays(window * 3 + i)) for i in range(3)]
        assert [r.scalars["applied_version"] for r in replies] == [None, None, window + 1]
        assert [r.scalars["accumulated"] for r in replies] == [1, 2, 0]
        assert_equal(params_of(replies[-1]), leaves)


def test_a_gradient_that_is_none_in_a_part_of_the_window_adds_nothing(made: Registry) -> None:
    session = create(made, {**SGD, "accumulate": 2}, arrays(1))
    first, second = arrays(2), arrays(3)
    step(session, {**first, "w": None})
    reply = step(session, {**second, "b": None})
    leaves = local.leaves(arrays(1))
    local.set_grads(leaves, second)
    leaves["b"].grad = torch.tensor(first["b"])
    for name in ("s", "e"):
        leaves[name].grad = torch.tensor(first[name]) + torch.tensor(second[name])
    torch.optim.SGD(leaves.values(), lr=0.5, foreach=False).step()
    assert_equal(params_of(reply), leaves)


def test_bfloat16_accumulates_in_float32(made: Registry) -> None:
    params = {"w": wire.Bits.bfloat16(arrays(1)["w"])}
    session = create(made, {**SGD, "accumulate": 3}, params)
    grads = [wire.Bits.bfloat16(arrays(seed)["w"]) for seed in (2, 3, 4)]
    for grad in grads:
        reply = step(session, {"w": grad})
    leaf = torch.nn.Parameter(torch.tensor(params["w"].to_float32()).bfloat16())
    total = sum(torch.tensor(grad.to_float32()) for grad in grads)
    leaf.grad = total.bfloat16()  # type: ignore[union-attr]
    torch.optim.SGD([leaf], lr=0.5, foreach=False).step()
    assert_equal(params_of(reply), {"w": leaf})


def test_bfloat16_has_torchs_bfloat16_moments(made: Registry) -> None:
    params = {"w": wire.Bits.bfloat16(arrays(1)["w"])}
    session = create(made, ADAM, params)
    leaf = torch.nn.Parameter(torch.tensor(params["w"].to_float32()).bfloat16())
    optimizer = torch.optim.Adam([leaf], lr=0.1, foreach=False)
    for seed in range(5):
        grad = wire.Bits.bfloat16(arrays(seed)["w"])
        reply = step(session, {"w": grad})
        leaf.grad = torch.tensor(grad.to_float32()).bfloat16()
        optimizer.step()
    assert_equal(params_of(reply), {"w": leaf})


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_loss_scale_is_what_gradscaler_unscales(made: Registry, dtype: str) -> None:
    scale = 3.0 * 2**10  # no power of two: 1 / scale is rounded
    params = arrays(1, dtype=dtype)
    session = create(made, SGD, params)
    scaled = {n: np.asarray(g * scale, dtype) for n, g in arrays(2, dtype=dtype).items()}
    reply = step(session, scaled, loss_scale=scale)
    leaves = local.leaves(params)
    local.set_grads(leaves, scaled)
    inverse = torch.tensor(scale).double().reciprocal().float()  # as GradScaler.unscale_ does
    for leaf in leaves.values():
        if leaf.dtype == torch.float32:
            torch._amp_foreach_non_finite_check_and_unscale_([leaf.grad], torch.zeros(1), inverse)
        else:  # torch's kernel takes no float64 on the CPU
            leaf.grad *= inverse.double()
    torch.optim.SGD(leaves.values(), lr=0.5, foreach=False).step()
    assert_equal(params_of(reply), leaves)


def test_value_clipping_comes_before_norm_clipping_and_the_norm_before_both(
    made: Registry,
) -> None:
    session = create(made, {**SGD, "clip_grad_value": 0.7, "clip_grad_norm": 1.5}, arrays(1))
    reply = step(session, arrays(2))
    leaves = local.leaves(arrays(1))
    local.set_grads(leaves, arrays(2))
    before = torch.nn.utils.get_total_norm([leaf.grad for leaf in leaves.values()])
    torch.nn.utils.clip_grad_value_(leaves.values(), 0.7)
    clipped = torch.nn.utils.clip_grad_norm_(leaves.values(), 1.5)
    torch.optim.SGD(leaves.values(), lr=0.5, foreach=False).step()
    assert_equal(params_of(reply), leaves)
    assert reply.scalars["grad_norm"] == float(before)
    assert reply.scalars["clip_coef"] == float(torch.clamp(1.5 / (clipped + 1e-6), max=1.0))


def test_the_norm_goes_over_all_groups_in_the_order_of_the_params(made: Registry) -> None:
    groups = [{"params": ["s", "b"], "lr": 0.25}]
    session = create(made, {**SGD, "clip_grad_norm": 0.5, "groups": groups}, arrays(1))
    reply = step(session, arrays(2))
    leaves = local.leaves(arrays(1))
    local.set_grads(leaves, arrays(2))
    norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5)
    torch.optim.SGD(
        [
            {"params": [leaves["b"], leaves["s"]], "lr": 0.25},
            {"params": [leaves["w"], leaves["e"]]},
        ],
        lr=0.5,
        foreach=False,
    ).step()
    assert_equal(params_of(reply), leaves)
    assert reply.scalars["grad_norm"] == float(norm)


def test_the_norm_of_a_window_is_that_of_its_sum(made: Registry) -> None:
    session = create(made, {**SGD, "accumulate": 2, "clip_grad_norm": 1.0}, arrays(1))
    first = step(session, arrays(2))
    second = step(session, arrays(3))
    one = {n: torch.tensor(g) for n, g in arrays(2).items()}
    both = {n: one[n] + torch.tensor(g) for n, g in arrays(3).items()}
    assert first.scalars["grad_norm"] == float(torch.nn.utils.get_total_norm(one.values()))
    assert second.scalars["grad_norm"] == float(torch.nn.utils.get_total_norm(both.values()))


def test_none_leaves_a_parameter_and_its_moments_alone(made: Registry) -> None:
    session = create(made, ADAM, arrays(1))
    leaves = local.leaves(arrays(1))
    optimizer = torch.optim.Adam(leaves.values(), lr=0.1, foreach=False)
    for seed in range(4):
        grads: dict[str, Any] = arrays(seed)
        if seed % 2:
            grads["b"] = None
        local.set_grads(leaves, grads)
        optimizer.step()
        reply = step(session, grads)
    assert_equal(params_of(reply), leaves)


def test_groups_in_a_step_are_assigned_before_the_update_and_stay(made: Registry) -> None:
    session = create(made, SGD, arrays(1))
    step(session, arrays(2), groups=[{"lr": 0.125}])
    reply = step(session, arrays(3))
    assert reply.scalars["groups"][0]["lr"] == 0.125
    leaves = local.leaves(arrays(1))
    optimizer = torch.optim.SGD(leaves.values(), lr=0.125, foreach=False)
    for seed in (2, 3):
        local.set_grads(leaves, arrays(seed))
        optimizer.step()
    assert_equal(params_of(reply), leaves)


def test_params_in_a_step_replace_the_sessions_before_the_update(made: Registry) -> None:
    session = create(made, SGD, arrays(1))
    reply = step(session, arrays(3), params=arrays(2))
    leaves = local.leaves(arrays(2))
    local.set_grads(leaves, arrays(3))
    torch.optim.SGD(leaves.values(), lr=0.5, foreach=False).step()
    assert_equal(params_of(reply), leaves)


def test_maximize_is_torchs_maximize(made: Registry) -> None:
    session = create(made, {**ADAM, "maximize": True}, arrays(1))
    reply = step(session, arrays(2))
    leaves = local.leaves(arrays(1))
    local.set_grads(leaves, arrays(2))
    torch.optim.Adam(leaves.values(), lr=0.1, foreach=False, maximize=True).step()
    assert_equal(params_of(reply), leaves)


def test_base_version_must_be_the_version(made: Registry) -> None:
    session = create(made, SGD, arrays(1))
    step(session, arrays(2), base_version=0)
    before = exported(session)
    with pytest.raises(VersionConflict) as caught:
        step(session, arrays(3), base_version=0)
    assert caught.value.detail == "base_version is 0, the session's version is 1"
    assert caught.value.extra["version"] == 1
    assert exported(session) == before


def test_delta_is_new_minus_old(made: Registry) -> None:
    session = create(made, SGD, arrays(1))
    old = session.published().result(10).arrays()
    reply = step(session, arrays(2), **{"return": "delta"})
    new = session.published().result(10).arrays()
    delta = params_of(reply)
    assert reply.returned == "delta"
    assert all(np.array_equal(delta[n], np.subtract(new[n], old[n])) for n in new)


# --- NaN and Infinity ----------------------------------------------------------------------------


def _with(value: float) -> dict[str, Any]:
    grads = arrays(2)
    grads["w"][3, 4] = value
    return grads


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_gradient_is_refused_by_name_and_index(made: Registry, value: float) -> None:
    session = create(made, ADAM, arrays(1))
    before = exported(session)
    with pytest.raises(Nonfinite) as caught:
        step(session, _with(value))
    assert caught.value.detail == f"grads['w'][3, 4] is {value}, must be finite"
    assert exported(session) == before


def test_skip_uses_the_seq_and_leaves_out_only_the_update(made: Registry) -> None:
    session = create(made, {**ADAM, "nonfinite": "skip", "accumulate": 2}, arrays(1))
    step(session, arrays(3))
    before = session.published().result(10).arrays()
    who = local.Identity(worker="w", seq=1, digest=b"1")
    reply = step(session, _with(np.nan), who, groups=[{"lr": 9.0}])
    assert reply.scalars["skipped"] == "nonfinite"
    assert reply.scalars["accumulated"] == 1
    assert reply.scalars["applied_version"] is None
    after = session.status().result(10)
    assert (after["version"], after["groups"][0]["lr"]) == (0, 9.0)
    now = session.published().result(10).arrays()
    assert all(np.array_equal(now[n], before[n]) for n in now)
    assert step(session, _with(np.nan), who, groups=[{"lr": 9.0}]).scalars["duplicate"]


def test_a_skipped_step_still_takes_the_params_that_came_with_it(made: Registry) -> None:
    session = create(made, {**ADAM, "nonfinite": "skip"}, arrays(1))
    reply = step(session, _with(np.nan), params=arrays(5))
    assert (reply.scalars["skipped"], reply.scalars["applied_version"]) == ("nonfinite", 1)
    assert_equal(params_of(reply), local.leaves(arrays(5)))
    assert local.read_back(session) == exported(session)


def test_an_overflow_under_loss_scale_is_skipped_as_gradscaler_does(made: Registry) -> None:
    session = create(made, ADAM, arrays(1))
    reply = step(session, _with(np.inf), loss_scale=1024.0)
    assert (reply.scalars["skipped"], reply.scalars["applied"]) == ("nonfinite", False)


def test_a_finite_gradient_whose_norm_overflows_is_taken(made: Registry) -> None:
    session = create(made, SGD, {"w": np.zeros(2, "f4")})
    reply = step(session, {"w": np.full(2, 3e38, "f4")})
    assert reply.scalars["applied"]
    assert reply.scalars["grad_norm"] == "Infinity"


def test_params_are_refused_inside_an_accumulation_window(made: Registry) -> None:
    session = create(made, {**SGD, "accumulate": 2}, arrays(1))
    step(session, arrays(2))
    before = exported(session)
    with pytest.raises(Conflict, match="accumulate is 2"):
        step(session, arrays(3), params=arrays(4))
    with pytest.raises(Conflict, match="window is open"):
        local.put_params(session, arrays(4), local.NOBODY).result(10)
    assert exported(session) == before


# --- sparse --------------------------------------------------------------------------------------


def test_sparse_rows_with_duplicates_are_summed_first(made: Registry) -> None:
    params = {"emb": arrays(1)["w"]}
    body = {"optimizer": {"name": "SparseAdam", "lr": 0.1}, "sparse": ["emb"]}
    session = create(made, body, params)
    leaf = torch.nn.Parameter(torch.tensor(params["emb"]))
    optimizer = torch.optim.SparseAdam([leaf], lr=0.1)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        indices, values = rng.integers(0, 5, (1, 4)), rng.normal(size=(4, 7)).astype("f4")
        grad = {"indices": indices.tolist(), "values": values.tolist(), "shape": [5, 7]}
        request = session.step_from_json({"grads": {"emb": grad}}, b"")
        reply = session.step(request, local.NOBODY).result(10)
        coo = torch.sparse_coo_tensor(indices, values, (5, 7), check_invariants=True)
        leaf.grad = coo.coalesce()
        optimizer.step()
        assert_equal(params_of(reply), {"emb": leaf})


def test_duplicates_of_a_class_that_would_add_them_one_by_one_are_summed_first(
    made: Registry,
) -> None:
    params = {"emb": arrays(1)["w"]}
    session = create(made, {**SGD, "sparse": ["emb"]}, params)
    rng = np.random.default_rng(3)
    indices, values = rng.integers(0, 5, (1, 60)), rng.normal(size=(60, 7)).astype("f4")
    grad = {"indices": indices.tolist(), "values": values.tolist(), "shape": [5, 7]}
    request = session.step_from_json({"grads": {"emb": grad}}, b"")
    reply = session.step(request, local.NOBODY).result(10)
    leaf = torch.nn.Parameter(torch.tensor(params["emb"]))
    leaf.grad = torch.sparse_coo_tensor(indices, values, (5, 7), check_invariants=True).coalesce()
    torch.optim.SGD([leaf], lr=0.5).step()
    assert_equal(params_of(reply), {"emb": leaf})


def test_a_row_beyond_the_table_is_refused_although_torchs_sgd_takes_it(made: Registry) -> None:
    session = create(made, {**SGD, "sparse": ["w"]}, {"w": arrays(1)["w"]})
    grad = {"indices": [[5]], "values": [[0.0] * 7], "shape": [5, 7]}
    with pytest.raises(Invalid, match=r"must be in \[0, 5\), got 5"):
        session.step_from_json({"grads": {"w": grad}}, b"")
