"""The whole way on real data: train a CNN with SRigL, condense it, compile it, read the report.

    python examples/train_condense_compile.py

`fanin demo` does the same with a dense training beside it, progress bars and timings.
"""

import torch
from torch import nn
from torch.nn import functional as F

import fanin_compile
from fanin_compile.train.data import digits

EPOCHS, BATCH = 6, 96

torch.manual_seed(0)
data = digits()
model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
    *(nn.Linear(64 * 4 * 4, 2048), nn.ReLU()),
    nn.Linear(2048, data.classes),
)

# 1. Train: every neuron learns which 10 % of its inputs to keep.
steps = EPOCHS * (len(data.train_x) // BATCH)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
srigl = fanin_compile.SRigL(model, optimizer, sparsity=0.9, total_steps=steps, delta_t=10)
for epoch in range(EPOCHS):
    for rows in torch.randperm(len(data.train_x)).split(BATCH)[: steps // EPOCHS]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
        loss.backward()
        optimizer.step()
        srigl.step()
    with torch.no_grad():
        print(f"epoch {epoch + 1}: loss {F.cross_entropy(model(data.train_x), data.train_y).item():.3f}")
srigl.finalize()
model.eval()

with torch.no_grad():
    expected = model(data.test_x)
    accuracy = (expected.argmax(1) == data.test_y).float().mean()
    print(f"test accuracy {accuracy:.2%}")

    # 2. Condense: a copy that holds the k weights of each neuron and where they stand, no dense weights.
    condensed = fanin_compile.condense(model)
    torch.testing.assert_close(condensed(data.test_x), expected, rtol=1e-4, atol=1e-4)
    dense_bytes, condensed_bytes = (
        sum(t.nbytes for t in m.state_dict().values()) for m in (model, condensed)
    )
    print(f"state_dict: {dense_bytes / 1e6:.1f} MB -> {condensed_bytes / 1e6:.1f} MB")

    # 3. Compile: the same from the masked model itself, inside torch.compile.
    compiled = torch.compile(model, backend="fanin")
    torch.testing.assert_close(compiled(data.test_x), expected, rtol=1e-4, atol=1e-4)

# 4. Inspect.
print(fanin_compile.explain(model, data.test_x))
