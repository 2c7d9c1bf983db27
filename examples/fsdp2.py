"""The model of tensor_parallel.py under FSDP2, in two processes on a CPU.

`python examples/fsdp2.py`: each process has half of every parameter and half of each batch. The numbers that it prints
are those of one process, `python examples/fsdp2.py --processes 1`. With `--processes 4 --tensor-parallel 2` two
processes share each block as well.
"""

import argparse

from tensor_parallel import ByteModel, add_arguments, train
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
    add_arguments(parser)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes that share each block (default: 1)")
    arguments = parser.parse_args()
    train(ShardedByteModel(), arguments, arguments.tensor_parallel)
