"""Whether the network's parts do what they are named for: what only the reference shows should be in V, not in C.

    python -m projects.mccdic.contradictions --output <file> [--ckpt FILE]

The shipped network restores 32 test slices of generated heads with structures that only the reference shows and others,
alike in the reference, that both contrasts show. In each slice with both kinds the share of H'*V in what explains the
reference's feature map is compared between them.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from shared.claims import interval95
from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.files import write_json

from .degrade import Degradation
from .inference import load_restorer, shipped_weights
from .model import MCCDic
from .phantom import PhantomSettings, cached_slices
from .scores import unique_shares
from .slices import WholeSlices

SMALLEST_EFFECT = 0.05  # of the share, fixed before the run
NUM_SLICES = 32


def compare(path: Path, num_slices: int = NUM_SLICES, settings: PhantomSettings | None = None) -> dict:
    """Compare the shares -> {"passed", "values", "statement"}.

    Args:
        path: weights of a network with a common code.
        num_slices: of the test split, at least three with both kinds of structures.
        settings: of the heads.

    Raises:
        InputError: another network, or too few slices with both kinds.
    """
    net = load_restorer(path)
    if not isinstance(net, MCCDic) or net.common is None:
        raise InputError(f"{path} holds a network without a common code; give one that has it")
    if net.num_references != 1:
        raise InputError(f"{path} holds a network of {net.num_references} references; give one of a single reference")
    with tempfile.TemporaryDirectory() as folder:
        slices = cached_slices(settings or PhantomSettings(), "test", num_slices, folder)
    rows = [unique_shares(net, batch) for batch in DataLoader(WholeSlices(slices, Degradation("rec", 4)))]
    known = [(row["unique_share"], row["unique_share_common"]) for row in rows if len(row) == 2]
    if len(known) < 3:
        raise InputError(f"{len(known)} slices with structures of the reference alone and of both; give at least 3")
    inside, common = zip(*known, strict=True)
    excess = [a - b for a, b in known]
    mean, _, low, high = interval95(excess)
    passed = True if low > 0 and mean >= SMALLEST_EFFECT else False if high < SMALLEST_EFFECT else None
    values = {"unique_share": statistics.mean(inside), "unique_share_common": statistics.mean(common)}
    values |= {"excess": mean, "low": low, "high": high}
    statement = (
        f"V explains {100 * values['unique_share']:.0f} % of what only the reference shows and "
        f"{100 * values['unique_share_common']:.0f} % of what both show; excess {mean:+.3f} [{low:+.3f}, "
        f"{high:+.3f}] over {len(excess)} slices"
    )
    return {"passed": passed, "values": values, "statement": statement}


def main() -> None:
    """Compare as the command line says, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--ckpt", type=Path, help="weights to take in place of the shipped ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = compare(options.ckpt or shipped_weights("rec4"))
    write_json(options.output, result)
    print(result["statement"])


if __name__ == "__main__":
    run_or_exit(main)
