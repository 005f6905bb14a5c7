"""The stages of a plan from the options of `generate`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

from m4.inference.autoregressive import Autoregressive
from m4.inference.guidance import Guidance
from m4.inference.inputs import pair
from m4.inference.prompts import reason
from m4.inference.sampler import Sampler, default_scheme
from m4.inference.scheme import Stage
from m4.interchange import fourm, fourm_plans
from m4.tokens.modality import Sequence

FLAGS = ("steps", "temperature", "top_k", "top_p", "min_p", "schedule")  # fields of schemes that flags set


def stages_of(args: argparse.Namespace, sampler: Sampler, given: Seq[str]) -> list[Stage]:
    """The stages that arguments ask for. `given`: names of the inputs, by which 4M's own plans are chosen.

    A released model of 4M has the schemes, temperatures and guidance of its demo, which options change.
    """
    if args.plan:
        if args.targets:
            raise ValueError("--plan and --targets exclude each other: a plan names its targets")
        from m4.config import load_config

        try:
            plan = load_config(args.plan, "plan")
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{args.plan} cannot be run: {reason(error)}") from error
        if not isinstance(plan, list | tuple) or not plan or not all(isinstance(stage, Stage) for stage in plan):
            raise ValueError(f"{args.plan}: plan must be a list of m4.inference.scheme.Stage, got {plan!r}")
        return list(plan)
    if not args.targets:
        raise ValueError(f"give --targets or --plan; allowed: {', '.join(sampler.modalities.signals)}")
    published = {}
    if fourm.is_released(sampler.modalities):
        published = {stage.target: stage for stage in fourm_plans.plan(sampler.modalities, given)}
    guidance = _guidance(args.guidance) if args.guidance else None
    stages, used = [], set()
    for name in _targets(args.targets, sampler, given, published):
        m = sampler.modalities.as_target(name)
        own = published[m.name] if m.name in published and not args.scheme else None
        scheme = default_scheme(m, args.scheme or "maskgit") if own is None else own.scheme
        fields = [f.name for f in dataclasses.fields(scheme)]
        changes = {f: getattr(args, f) for f in FLAGS if getattr(args, f) is not None and f in fields}
        used |= {*changes} | ({"scheme"} if not isinstance(m, Sequence) and args.scheme else set())
        scheme = dataclasses.replace(scheme, **changes)
        ensemble = 1 if isinstance(scheme, Autoregressive) else args.ensemble
        stage_guidance = own.guidance if guidance is None and own is not None else guidance
        stages.append(Stage(target=name, scheme=scheme, guidance=stage_guidance, ensemble=ensemble))
    if args.ensemble > 1:
        used |= {"ensemble"} if any(stage.ensemble > 1 for stage in stages) else set()
    for flag in ("scheme", *FLAGS, *(["ensemble"] if args.ensemble > 1 else [])):
        if getattr(args, flag) is not None and flag not in used:
            raise ValueError(f"--{flag.replace('_', '-')} fits no target of {', '.join(args.targets)}")
    return stages


def second_of(
    args: argparse.Namespace, sampler: Sampler, stages: Seq[Stage], given: Seq[str]
) -> tuple[Sampler | None, tuple[Stage, ...]]:
    """The second model of an imported 4M model and its stages, if they are wanted. ValueError if there is none, or
    nothing that it could go on from."""
    if not args.super_resolution:
        return None, ()
    folder = Path(args.run) / "super_resolution"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{args.run} has no super-resolution model; give it to `python -m m4 import`, too")
    second = Sampler.load(folder, batch_size=args.batch_size)
    known = [sampler.modalities.as_target(stage.target).name for stage in stages]
    known += [sampler.modalities.as_input(name.partition("#")[0]).name for name in given]
    if not (found := fourm_plans.super_resolution(second.modalities, known)):
        raise ValueError(f"--super-resolution goes on from tok_rgb@224 and others; here are {', '.join(known)}")
    return second, found


def _targets(names: Seq[str], sampler: Sampler, given: Seq[str], published: Mapping[str, Stage]) -> Seq[str]:
    """The names, or for "all" everything that is not given: in 4M's order, else in the model's."""
    if [*names] != ["all"]:
        return names
    if published:
        return [*published]
    known = {sampler.modalities.as_input(name.partition("#")[0]).signal for name in given}
    return [m.name for m in sampler.modalities if m.is_target and m.signal not in known]


def _guidance(values: Seq[str]) -> Guidance:
    try:
        if len(values) == 1 and "=" not in values[0]:
            return Guidance(scale=float(values[0]))
        pairs = [pair("--guidance", v) for v in values]
        return Guidance(scale=tuple((name, float(weight)) for name, weight in pairs))
    except ValueError as error:
        given = " ".join(values)
        raise ValueError(f"--guidance takes one finite number, or NAME=WEIGHT ... of each name; got {given}") from error
