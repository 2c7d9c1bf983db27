"""The model of tensor_parallel.py under FSDP2, in two processes on a CPU.

`python examples/fsdp2.py`: each process has half of every parameter and half of each batch. With `--tensor-parallel 2`
there are four, of which two share each block as well. What is logged is what one process with these batches logs.
"""

import argparse

from tensor_parallel import ByteModel, train
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


class ShardedByteModel(ByteModel):
    """Gathers each part's parameters when it runs."""

    def lay_out(self, mesh: DeviceMesh) -> None:
        """Put the model on a mesh of processes."""
        if mesh["tensor_parallel"].size() > 1:
            super().lay_out(mesh)
        for part in (self.embed, *self.blocks, self.head):
            fully_shard(part, mesh=mesh["data_parallel"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes that share each block (default: 1)")
    train(ShardedByteModel(), 2, parser.parse_args().tensor_parallel)
