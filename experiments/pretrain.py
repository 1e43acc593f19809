"""θ_pre where no file is at hand: trained here, on other classes than the study's.

    python reproduce.py pretrain --dataset tinyimagenet --data data/tiny-imagenet-200 \\
        --arch resnet18 --pretrain_classes even --preset quick
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import datasets
from datasets.images import ImageSet, fingerprint
from datasets.loader import BatchLoader, augmentation_for
from datasets.normalization import normalization
from models import build_model
from models.vgg import VGGS, add_batchnorm, fold_batchnorm
from utils import checkpoint as ckpt
from utils.engine import TrainStep, check_side, choose_device, sgd, to_device, train_epoch, use_amp
from utils.files import hold


def make_pretrained(args: argparse.Namespace, time_left: Callable[[int], str]) -> None:
    """Train θ_pre into args.pretrained, unless it is there and not to be redone.

    time_left: of all that is to be trained, in words, from the number of epochs done.

    Of several processes that want it one trains, the others wait for it.
    """
    path = Path(args.pretrained)
    with hold(path.with_name(f".{path.name}.lock")):
        if path.exists() and not args.force:
            return
        # The other half of the classes; the synthetic set has a split for it.
        split = "train" if args.pretrain_classes else "pretrain"
        which = args.image_size, args.pretrain_classes, args.train_images
        images = datasets.load(args.dataset, args.data, split, *which)
        check_side(args.arch, images.images)
        count = f"{len(images):,} images of {len(images.classes)} other classes"
        print(f"θ_pre: {args.arch} on {count}", flush=True)
        pretrain(args, images, path, time_left)


def pretrain(args: argparse.Namespace, images: ImageSet, path: Path, time_left: Callable) -> None:
    """Train args.arch from random weights on `images` and write θ_pre to `path`.

    SGD, momentum 0.9, weight decay 5e-4, batch 64, one cycle up to lr 0.05. A VGG trains with
    batch norm, which is folded into its convolutions at the end. After every epoch its state is
    kept beside `path`, where a killed run goes on.
    """
    arch, epochs, device = args.arch, args.pretrain_epochs, choose_device(args.device)
    torch.manual_seed(0)
    model = build_model(arch, len(images.classes), *normalization(images.name, images))
    if arch in VGGS:
        add_batchnorm(model, arch)
    amp = use_amp(device, args.amp)
    model = to_device(model, device, amp)
    loader = BatchLoader(images, 64, augmentation_for(images.name), device, shuffle=True)
    optimizer = sgd(model, 0.05)
    # A recorded step has one momentum.
    form = {"epochs": epochs, "steps_per_epoch": len(loader), "cycle_momentum": False}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, **form)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "loader": loader}
    settings = {"arch": arch, "epochs": epochs, "data": fingerprint(images)}
    unfinished = path.with_name(f"{path.name}.unfinished")
    if unfinished.exists():
        saved = ckpt.read(unfinished)
        if {name: saved.get(name) for name in settings} == settings:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
    step = TrainStep(model, optimizer, amp=amp)
    for epoch in range(loader.epoch + 1, epochs + 1):
        title = f"pretraining {epoch}/{epochs}"
        stats = train_epoch(
            model, loader, optimizer, amp=amp, title=title, schedule=schedule, step=step
        )
        told = f"loss {stats.loss:.4f}  train {stats.accuracy:.2f}  {time_left(epoch)}"
        print(f"{title}  {told}", flush=True)
        state = {name: part.state_dict() for name, part in parts.items()}
        ckpt.save(settings | state, unfinished)
    if arch in VGGS:
        fold_batchnorm(model, arch)
    ckpt.save({"state_dict": model.state_dict(), "arch": arch}, path)
    unfinished.unlink(missing_ok=True)
