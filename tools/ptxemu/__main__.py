"""``cd tools && python -m ptxemu FILE.ptx``: kernels, their parameters, instructions that are not supported."""

import sys
from pathlib import Path

from . import load

for path in sys.argv[1:]:
    module = load(Path(path).read_text())
    for name in module.kernels:
        kernel = module.kernel(name)
        parameters = ", ".join(f"{p.type.name}[{p.size}]" if p.is_array else p.type.name for p in kernel.parameters)
        print(f"{name}({parameters}): {len(kernel.code)} instructions")
        for line in module.unsupported(name):
            print(f"    unsupported: {line}")
