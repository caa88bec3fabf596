"""Losses over a vocabulary that processes share, against the eager ones over all of it."""

import subprocess
import sys

from helpers.commands import PATIENCE

CODE = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from ee_tuning.losses import cross_entropy, distillation, rejection
from ee_tuning.parallel.tensor import SplitSoftmax
torch.set_num_threads(1)
second = os.fork()
rank = int(second == 0)
store = dist.FileStore(sys.argv[1], 2)
dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
softmax = SplitSoftmax(init_device_mesh("cpu", (2,)), 12)
generator = torch.Generator().manual_seed(0)
whole = 3 * torch.randn(2, 7, 12, generator=generator)
whole[0, 1] += 100  # would overflow without its largest taken off
teacher = torch.randn(2, 7, 12, generator=generator).log_softmax(-1)
labels = torch.randint(12, (2, 7), generator=generator)
labels[0, 2] = labels[1, 0] = labels[1, 6] = -100
cut = slice(6 * rank, 6 * rank + 6)
losses = {
    "ce": lambda x, t, *s: cross_entropy(x, labels, False, *s),
    "dynamic": lambda x, t, *s: cross_entropy(x, labels, True, *s),
    "kl": lambda x, t, *s: distillation(x, t, labels, 2.0, True, *s),
    "acceptance": lambda x, t, *s: rejection(x, t, labels, 0.6, True, *s),
}
for name, loss in losses.items():
    for dtype in (torch.float32, torch.bfloat16):
        x = whole.to(dtype, copy=True).requires_grad_()
        part = x.detach()[..., cut].clone().requires_grad_()
        expected = loss(x, teacher)
        found = loss(part, teacher[..., cut], softmax)
        expected.total.backward()
        found.total.backward()
        torch.testing.assert_close(found.total, expected.total, msg=name)
        assert found.count == expected.count
        torch.testing.assert_close(part.grad, x.grad[..., cut], msg=name)
dist.destroy_process_group()
if second and os.waitpid(second, 0)[1]:
    raise SystemExit(1)
"""


def test_value_and_gradient_equal_the_eager_losses(tmp_path):
    command = [sys.executable, "-c", CODE, tmp_path / "store"]
    done = subprocess.run(command, timeout=PATIENCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
