"""Are the nodes of a cluster alike, and do they see what they need? Asked before any engine loads."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from topd_ray.actors import node_facts
from topd_ray.actors.node_facts import NodeFacts
from topd_ray.actors.placement import cluster_nodes
from topd_ray.actors.room import Need
from topd_ray.config.model_folder import is_local
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError

LOOK_SECONDS = 120.0
"""How long a node may take to answer; the first process on it unpacks the working directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one node said."""

    address: str
    roles: frozenset[str]
    """of the workers it will hold"""
    facts: NodeFacts


def check_nodes(config: TopdConfig, wanted: Sequence[Need], group: PlacementGroup) -> None:
    """Look at every node of `group` but the driver's own, which holds `wanted`, bundle by bundle.

    Raises ConfigError with a line for each node that has other package versions than the driver, lacks a model folder,
    or does not see the run folder though a learner rank there writes to it.
    """
    roles: dict[str, set[str]] = {}
    for bundle, node_id in placement_group_table(group)["bundles_to_node_id"].items():
        roles.setdefault(node_id, set()).add(wanted[int(bundle)].role)
    roles.pop(ray.get_runtime_context().get_node_id(), None)
    if not roles:
        return
    folder = config.run.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    marker, content = folder / ".seen-by-all-nodes", secrets.token_hex(16)
    marker.write_text(content)
    try:
        answers = _ask(roles, _model_folders(config), marker, content)
    finally:
        marker.unlink()
    _check(answers, folder)


def look_at_place(config: TopdConfig, role: str, group: PlacementGroup, bundle: int) -> ray.ObjectRef:
    """The facts, for `check_place`, of the node that `bundle` is on, as soon as it is on one."""
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    cloudpickle.register_pickle_by_value(node_facts)
    try:
        look = ray.remote(node_facts.look).options(num_cpus=0, scheduling_strategy=place)
        return look.remote(_model_folders(config)[role], "", "")
    finally:
        cloudpickle.unregister_pickle_by_value(node_facts)


def check_place(config: TopdConfig, role: str, group: PlacementGroup, bundle: int, facts: NodeFacts) -> None:
    """Raise ConfigError, as `check_nodes` does, if a worker that is made anew would not fit where `bundle` is now.

    Learner ranks, which write to the run folder, are not made anew.
    """
    node_id = placement_group_table(group)["bundles_to_node_id"].get(bundle)
    addresses = {node.node_id: node.address for node in cluster_nodes()}
    address = addresses.get(node_id, f"node {node_id}")
    _check([Answer(address=address, roles=frozenset([role]), facts=facts)], config.run.folder)


def _check(answers: Sequence[Answer], folder: Path) -> None:
    if problems := problems_of(answers, node_facts.versions(), folder):
        raise ConfigError("\n  ".join(["the nodes of the Ray cluster do not fit together:", *problems]))


def _ask(
    roles: Mapping[str, set[str]], model_folders: Mapping[str, list[str]], marker: Path, content: str
) -> list[Answer]:
    addresses = {node.node_id: node.address for node in cluster_nodes()}
    cloudpickle.register_pickle_by_value(node_facts)
    try:
        look = ray.remote(node_facts.look)
        futures = {
            node_id: look.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            ).remote(sorted({one for role in own for one in model_folders[role]}), str(marker), content)
            for node_id, own in roles.items()
        }
        answers = []
        for node_id, future in futures.items():
            facts = _answer(addresses[node_id], future)
            answers.append(Answer(address=addresses[node_id], roles=frozenset(roles[node_id]), facts=facts))
    finally:
        cloudpickle.unregister_pickle_by_value(node_facts)
    return answers


def _answer(address: str, future: ray.ObjectRef) -> NodeFacts:
    try:
        facts: NodeFacts = ray.get(future, timeout=LOOK_SECONDS)
    except GetTimeoutError:
        raise ConfigError(f"node {address} started no process within {LOOK_SECONDS:g} s") from None
    except RayError as error:
        raise ConfigError(f"node {address} cannot run a worker: {error}") from error
    return facts


def _model_folders(config: TopdConfig) -> dict[str, list[str]]:
    """The local model folders that workers of each role read."""
    student = [config.student.model] if is_local(config.student.model) else []
    teacher = [config.teacher.model] if is_local(config.teacher.model) else []
    return {"rollout": student, "learner": student, "teacher": [*student, *teacher]}


def problems_of(answers: Sequence[Answer], own: Mapping[str, str], folder: Path) -> list[str]:
    lines = []
    for answer in answers:
        theirs = answer.facts.versions
        other = [f"{name} {theirs[name]} (here {mine})" for name, mine in own.items() if theirs[name] != mine]
        if other:
            lines.append(f"{answer.address} has {', '.join(other)}; right would be the same versions on every node")
        for missing in answer.facts.missing_folders:
            lines.append(f"{answer.address} has no model folder {missing}; right would be a path that every node has")
        if "learner" in answer.roles and not answer.facts.sees_marker:
            lines.append(
                f"{answer.address} does not see the run folder {folder}, to which its learner ranks write checkpoints; "
                "right would be run.root on a disk that all nodes share"
            )
    return lines
