"""Restore MRI volumes: `python -m projects.mccdic.predict input=<target> reference=<guide> output=<path>`."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from rich.progress import Progress
from torch import Tensor, nn

from shared.errors import InputError
from shared.experiment import choose_device, command
from shared.io.fastmri import KSpaceFile, read_kspace
from shared.io.files import write_json
from shared.io.volumes import Volume, read_volume, write_volume

from . import schema  # noqa: F401  (registers the configuration's types)
from .degrade import Degradation
from .inference import intensity, load_restorer, restore, shipped_weights
from .masks import CENTER_FRACTIONS
from .pairs import Pair, better_orientation, pair_kspace, pair_volumes
from .scores import VolumeScores
from .spectrum import line_unevenness, share_outside

KSPACE = (".h5", ".hdf5")
READABLE = (".nii", ".nii.gz", ".mgz", ".mgh", *KSPACE)
WRITABLE = (".nii", ".nii.gz")
DTYPES = ("like", "uint8", "int16", "uint16", "int32", "float32", "float64")
PHASE_ENCODINGS = ("auto", "columns", "rows")
GUIDES = (".nii.gz", ".nii", ".mgz", ".mgh")
# of line_unevenness: below the first nothing was left out, above the second something was
EVEN, UNEVEN = 0.6, 0.8
MORE_UNEVEN = 1.3  # times, than the other axis
SHARPER = 0.015  # share of the energy that no image of a wider pixel has outside of its middle
OTHER_SHARE = 1.45  # times the share of samples that the task has


@dataclass(frozen=True)
class Job:
    """What is restored into which file."""

    source: Path
    references: tuple[Path, ...]
    output: Path


def run(config: DictConfig) -> list[Path]:
    """Restore every volume of the input; return the files written."""
    degradation = check_options(config)
    jobs = plan_jobs(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    net = load_restorer(config.ckpt_path or shipped_weights(task_name(config)), config.step_size).to(device)
    count = len(jobs[0].references)
    if count != net.num_references:
        raise InputError(f"the network takes {net.num_references} references, {count} were given; see reference=")
    scores = {}
    with Progress() as progress:

        def say(words: str) -> None:
            progress.console.print(words, soft_wrap=True, markup=False, highlight=False)

        for job in jobs:
            task = progress.add_task(job.source.name, total=None)
            found = restore_file(
                job, net, config, degradation, say,
                lambda done, total, task=task: progress.update(task, completed=done, total=total),
            )  # fmt: skip
            progress.remove_task(task)
            if found:
                scores[job.source.name] = found
    if config.metrics:
        write_json(config.metrics, scores)
    print(f"wrote {jobs[0].output if len(jobs) == 1 else f'{len(jobs)} volumes to {config.output}'}")
    return [job.output for job in jobs]


def restore_file(
    job: Job, net: nn.Module, config: DictConfig, degradation: Degradation, say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Restore one volume and write it.

    Returns:
        With simulate=true the scores, {"zero_filled" and "restored": {"volume_psnr", "volume_ssim", "volume_nmse"}}.

    Raises:
        InputError: the files cannot be used, do not match, or cannot be written.
    """
    source, pair = read_pair(job, config, degradation)
    for words in pair.notes:
        say(words)
    if isinstance(source, KSpaceFile) and (other := better_orientation(pair)):
        say(
            f"warning: {job.source.name} looks turned or mirrored against its reference, taken as {pair.frame}; "
            f"orientation={other} fits better"
        )
    target, truth = torch.from_numpy(pair.target), None
    guides = torch.from_numpy(pair.references)
    turned = config.phase_encoding == "rows"
    if config.simulate:
        truth = target.abs()
        target = degraded(target, degradation, turned)
        guides = degraded(guides, degradation, turned) if config.joint else guides
    elif isinstance(source, KSpaceFile):
        target = target.abs()
        warn_of_samples(source, degradation, say)
    elif target.any():
        turned = look_at_spectrum(target, job.source.name, config, degradation, say) or turned
    empty = int((target == 0).all(-1).all(-1).sum())
    if 0 < empty < len(target):
        say(f"{job.source.name}: {empty} of {len(target)} slices are zero everywhere and stay so")
    scale = intensity(target.numpy(), f"target {job.source}")
    for guide, path in zip(guides.unbind(1), job.references, strict=True):
        guide /= intensity(guide.numpy(), f"reference {path}")
    restored = restore(
        net, upright(target / scale, turned), upright(guides, turned), batch_size=config.batch_size,
        progress=progress,
    )  # fmt: skip
    restored = upright(restored, turned).clamp(min=0) * scale
    made = pair.volume(restored.numpy())
    if made.path != job.source:
        made = as_of(made, source)
    dtype = config.dtype
    if num_clipped := write_volume(job.output, made.data, made, dtype):
        kept = made.dtype if dtype == "like" else dtype
        say(f"{job.output.name}: {num_clipped} voxels beyond the range of {kept} were clipped; say dtype=float32")
    return {} if truth is None else score({"zero_filled": target, "restored": restored}, truth, job, say)


def read_pair(job: Job, config: DictConfig, degradation: Degradation) -> tuple[Volume | KSpaceFile, Pair]:
    """Read target and references and bring them together."""
    kspace = is_kspace(job.source)
    source = read_kspace(job.source) if kspace else read_volume(job.source, config.frame)
    references = [read_volume(path, config.reference_frame, "reference_frame") for path in job.references]
    if kspace:
        if config.axis != "auto":
            raise InputError("axis= is for NIfTI files; orientation= says which way k-space lies")
        if config.simulate and sampled_share(source, "rec") < 1:
            raise InputError(f"{job.source} is undersampled already; leave simulate=true away")
        return source, pair_kspace(source, references, orientation=config.orientation, resampled=config.resample)
    if config.orientation:
        raise InputError("orientation= is for k-space files; a NIfTI file says its own")
    factor = degradation.factor if degradation.task == "sr" and not config.simulate else None
    axis = None if config.axis == "auto" else config.axis
    return source, pair_volumes(source, references, factor=factor, axis=axis, resampled=config.resample)


def upright(images: Tensor, turned: bool) -> Tensor:
    """Let the lines that k-space lacks be columns, as in training, or turn back: rows and columns change places."""
    return images.mT.contiguous() if turned else images


def degraded(images: Tensor, degradation: Degradation, turned: bool) -> Tensor:
    """Give the zero-filled magnitudes of images (N, ..., H, W), slice by slice: their k-space takes more memory."""
    return torch.stack([upright(degradation(upright(image, turned)).image, turned) for image in images])


def look_at_spectrum(
    target: Tensor, name: str, config: DictConfig, degradation: Degradation, say: Callable[[str], None]
) -> bool:
    """Warn where the target cannot be what the task restores; say whether it was rows that its k-space lacks."""
    if degradation.task == "sr":
        if (share := share_outside(target, degradation.factor)) > SHARPER:
            say(
                f"warning: {name} has {share:.1%} of its energy outside of the middle of k-space that task="
                f"{task_name(config)} starts from; say simulate=true to try the task on a fully sampled image"
            )
        return False
    rows, columns = line_unevenness(target)
    if max(rows, columns) < EVEN:
        say(
            f"warning: {name} looks fully sampled, task={task_name(config)} takes undersampled images; say "
            "simulate=true to try the task on a fully sampled one"
        )
    if config.phase_encoding != "auto":
        return False
    found = rows > max(UNEVEN, MORE_UNEVEN * columns)
    if found:
        say(f"{name}: k-space lacks rows of the slices, not columns; they are turned for the network")
    return found


def warn_of_samples(file: KSpaceFile, degradation: Degradation, say: Callable[[str], None]) -> None:
    """Warn where k-space is not what the task restores."""
    name = file.path.name
    share = sampled_share(file, degradation.task)
    usual = float(degradation.samples(*file.shape[-2:]).float().mean())
    if share == 1:
        say(f"warning: {name} is fully sampled; say simulate=true to try the task on it")
    elif not 1 / OTHER_SHARE < share / usual < OTHER_SHARE:
        say(f"warning: {name} has 1 of {1 / share:.1f} samples, the task is trained for 1 of {1 / usual:.1f}")


def sampled_share(file: KSpaceFile, task: str) -> float:
    """Give the share of the samples of the middle slice that are there; for `rec`, of those that are not its rim.

    Scanners that keep less than all of a grid fill it with zeros around what they have.
    """
    there = file[len(file) // 2] != 0
    there = there.any(0) if file.is_multi_coil else there
    share = 1.0
    for lines in (there.any(0), there.any(1)):
        if task == "rec":
            kept = np.flatnonzero(lines)
            lines = lines[kept[0] : kept[-1] + 1]
        share *= float(lines.mean())
    return share


def as_of(made: Volume, source: Volume | KSpaceFile) -> Volume:
    """Let a volume on the reference's grid be written as numbers of its source's type."""
    header = made.header.copy()
    header["cal_min"] = header["cal_max"] = 0  # how to display the reference
    header["descrip"] = b""
    if isinstance(source, KSpaceFile):
        return replace(made, header=header, dtype=np.dtype(np.float32), scaling=(1.0, 0.0))
    return replace(made, header=header, dtype=source.dtype, scaling=source.scaling)


def score(
    images: dict[str, Tensor], truth: Tensor, job: Job, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Compare volumes (N, H, W) with the fully sampled one, whose largest value is the peak, and say how they do."""
    found = {}
    for name, image in images.items():
        scores = VolumeScores()
        for slices in zip(image, truth, strict=True):
            scores.add(job.source.name, *(one[None, None] for one in slices), truth.max()[None])
        found[name] = scores.means()
        values = found[name]
        say(
            f"{job.source.name}: {name.replace('_', '-')} PSNR {values['volume_psnr']:.2f} dB, SSIM "
            f"{values['volume_ssim']:.4f}, NMSE {values['volume_nmse']:.4f}"
        )
    return found


def check_options(config: DictConfig) -> Degradation:
    """Check what is no file's matter; give the degradation that the task undoes.

    Raises:
        InputError: names the option.
    """
    known = CENTER_FRACTIONS if config.task == "rec" else range(2, 10)
    if config.factor not in known:
        raise InputError(
            f"task {config.task} has no factor={config.factor}; choose one of {', '.join(map(str, known))}"
        )
    for option, known in (("dtype", DTYPES), ("phase_encoding", PHASE_ENCODINGS), ("axis", ("auto", 0, 1, 2))):
        if config[option] not in known:
            raise InputError(f"{option}={config[option]} is unknown; choose one of {', '.join(map(str, known))}")
    if config.batch_size < 1:
        raise InputError(f"batch_size is at least 1, not {config.batch_size}")
    if config.metrics and not config.simulate:
        raise InputError("metrics need a truth to compare with: say simulate=true too and give a fully sampled input")
    return Degradation(config.task, config.factor)


def task_name(config: DictConfig) -> str:
    """Name the task as the configuration's group does."""
    return f"{'joint' if config.joint else config.task}{config.factor}"


def plan_jobs(config: DictConfig) -> list[Job]:
    """Say which file becomes which.

    Raises:
        InputError: an option is missing; no volume there; an output that cannot be a volume or would overwrite a file
            that is read.
    """
    if not config.input or not config.output:
        raise InputError("say what to restore and where to write it: INPUT=<volume or k-space> OUTPUT=<path>")
    given = config.reference
    names = list(given) if isinstance(given, ListConfig) else [given] if given else []
    if not names:
        raise InputError('no reference; say ARGS="reference=<volume of another contrast>"')
    source, output, references = Path(config.input), Path(config.output), [Path(str(name)) for name in names]
    jobs = [Job(source, tuple(references), output)]
    if source.is_dir():
        jobs = [folder_job(file, references, output) for file in list_volumes(source)]
    read = {path.resolve() for job in jobs for path in (job.source, *job.references)}
    for job in jobs:
        if not job.output.name.lower().endswith(WRITABLE):
            raise InputError(f"cannot write {job.output}: end the name with .nii.gz or .nii")
        if job.output.resolve() in read:
            raise InputError(f"{job.output} would overwrite a file that is read; choose another OUTPUT")
    for job, other in itertools.combinations(jobs, 2):
        if job.output == other.output:
            raise InputError(f"{job.source.name} and {other.source.name} would both become {job.output}; rename one")
    return jobs


def folder_job(file: Path, references: list[Path], output: Path) -> Job:
    """Find the references of one file of a folder: those of its name in folders of their own."""
    stem = next(file.name[: -len(ending)] for ending in READABLE if file.name.lower().endswith(ending))
    guides = []
    for folder in references:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; the reference of a folder is a folder with files of equal names")
        kinds = [path for ending in GUIDES if (path := folder / f"{stem}{ending}").is_file()]
        if not kinds:
            raise InputError(f"no file {folder / stem}.nii.gz for {file}; give its reference the same name")
        guides.append(kinds[0])
    name = file.name if file.name.lower().endswith(WRITABLE) else f"{stem}.nii.gz"
    return Job(file, tuple(guides), output / name)


def list_volumes(folder: Path) -> list[Path]:
    """List what can be restored of a folder, in the order of names.

    Raises:
        InputError: nothing.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.lower().endswith(READABLE))
    if not files:
        raise InputError(f"no volumes in {folder}; give files that end in one of {', '.join(READABLE)}")
    return files


def is_kspace(path: Path) -> bool:
    """Whether a file holds k-space, by its name."""
    return path.suffix.lower() in KSPACE


if __name__ == "__main__":
    command(run, __file__, "predict")
