"""Makes step.hlo: a training step of two linear layers, as PyTorch/XLA 2.9.0 compiles it for eight devices.

    python3.11 -m venv V && V/bin/pip install torch==2.9.0 torch_xla==2.9.0 absl-py numpy pyyaml requests
    V/bin/python tests/golden/torch_xla/make.py

GSPMD over emulated CPU devices, `data` 2 x `model` 4: the batch over data, hidden units over model. The text
is XLA's own but for the folders of source files, of which the last part is kept.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

DEVICES, BATCH, WIDTH, HIDDEN = 8, 16, 32, 64
DUMP = tempfile.mkdtemp()
os.environ |= {
    "PJRT_DEVICE": "CPU",
    "CPU_NUM_DEVICES": str(DEVICES),
    "XLA_FLAGS": f"--xla_dump_to={DUMP} --xla_dump_hlo_as_text",
    "XLA_HLO_DEBUG": "1",  # names and source lines in the metadata
    "XLA_IR_DEBUG": "1",
}

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch_xla  # noqa: E402
import torch_xla.distributed.spmd as spmd  # noqa: E402
import torch_xla.runtime as runtime  # noqa: E402

runtime.use_spmd()
mesh = spmd.Mesh(np.arange(DEVICES), (2, DEVICES // 2), ("data", "model"))
device = torch_xla.device()
up = torch.nn.Linear(WIDTH, HIDDEN, bias=False).to(device)
down = torch.nn.Linear(HIDDEN, WIDTH, bias=False).to(device)
batch = torch.randn(BATCH, WIDTH).to(device)
spmd.mark_sharding(up.weight, mesh, ("model", None))
spmd.mark_sharding(down.weight, mesh, (None, "model"))
spmd.mark_sharding(batch, mesh, ("data", None))
optimizer = torch.optim.SGD([*up.parameters(), *down.parameters()], lr=0.1)
torch_xla.sync()
for _ in range(2):
    optimizer.zero_grad()
    loss = (down(torch.relu(up(batch))) ** 2).sum()
    loss.backward()
    optimizer.step()
    torch_xla.sync()
print(loss.item())
(found,) = Path(DUMP).glob("*SyncTensorsGraph*cpu_after_optimizations.txt")
text = re.sub(r'source_file="[^"]*/', 'source_file="', found.read_text())
Path(__file__).with_name("step.hlo").write_text(text)
