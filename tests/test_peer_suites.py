"""scripts/peer_suites.py: the adapters that other projects' tests run on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("peer_suites", ROOT / "scripts/peer_suites.py")
peer_suites = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer_suites)


def test_scipys_own_tests_pass_with_our_assignment():
    pytest.importorskip("scipy.optimize.tests.test_linear_assignment")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               "-W", "ignore", "-c", os.devnull, "-p", "peer_suites", "--ours", "scipy", "--pyargs",
               "scipy.optimize.tests.test_linear_assignment"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_the_assignment_is_ours(monkeypatch):
    import virft_fast.matching as matching

    calls, ours = [], matching.assign
    monkeypatch.setattr(matching, "assign", lambda *a, **k: calls.append(a) or ours(*a, **k))
    rows, columns = peer_suites.linear_sum_assignment([[4, 1, 3], [2, 0, 5]])
    assert calls and rows.tolist() == [0, 1] and columns.tolist() == [1, 0]


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("reference", ["logps", "head", None])
def test_our_module_is_a_stand_in_for_ligers(loss_type, reference):
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    hidden, weight, bias = draw(4, 5, 8), draw(17, 8), draw(17)
    ids, mask = torch.randint(17, (4, 5), generator=g), torch.ones(4, 5)
    mask[1, 3:] = 0
    given = {"old_per_token_logps": draw(4, 5).sub(3), "vllm_is_ratio": draw(4, 5).exp()}
    if reference == "logps":
        given["ref_per_token_logps"] = draw(4, 5).sub(3)
    if reference == "head":
        given |= {"ref_input": draw(4, 5, 8), "ref_weight": draw(17, 8), "ref_bias": draw(17)}
    results = []
    for module in (liger.LigerFusedLinearGRPOLoss, peer_suites.FusedLinearGRPOLoss):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        loss, metrics = module(
            beta=0.1,
            loss_type=loss_type,
            compiled=False,
            temperature=0.8,
            use_ref_model=reference is not None,
            use_bias_correction_kl=True,
        )(leaves[0], leaves[1], ids, mask, torch.tensor([1.0, -1, 2, -2]), leaves[2], **given)
        results.append((loss, *metrics, *torch.autograd.grad(loss, leaves)))
    for got, value in zip(*results, strict=True):
        torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-4)
