"""Room for the workers, and nodes that fit together."""

import itertools
import math
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topd_ray.actors import fleet, node_facts
from topd_ray.actors.cluster import check_run_folder
from topd_ray.actors.learner import interface_of
from topd_ray.actors.nodes import Answer, problems_of
from topd_ray.actors.placement import needs, with_gpus_of
from topd_ray.actors.room import Need, Node, shortage
from topd_ray.config.load import load_config
from topd_ray.errors import ConfigError, LearnerError

DEMO = Path(__file__).parents[2] / "jobs" / "demo.yaml"


def need(role: str, /, *, index: int = 0, cpus: int = 1, gpus: float = 0.0, **labels: str) -> Need:
    return Need(role=role, index=index, num_cpus=cpus, num_gpus=gpus, labels=labels)


def node(address: str, *, cpus: float = 1.0, gpus: float = 0.0, **labels: str) -> Node:
    return Node(node_id=address, address=address, resources={"CPU": cpus, "GPU": gpus}, labels=labels)


def test_room() -> None:
    wanted = [need("rollout", gpus=0.5), need("teacher", cpus=2, gpus=4.0, kind="big")]
    assert shortage(wanted, [node("a", gpus=1.0), node("b", cpus=4, gpus=8.0, kind="big")]) == []


def test_what_is_missing() -> None:
    wanted = [need("rollout"), need("teacher", cpus=3), need("learner", gpus=2.0, kind="big")]
    assert shortage(wanted, [node("a", cpus=2), node("b", cpus=2, gpus=1.0, kind="big")]) == [
        "the run needs 5 CPUs, the cluster has 4",
        "the run needs 2 GPUs, the cluster has 1",
        "no node can hold teacher 0: 3 CPU, 0 GPU",
        "no node can hold learner 0: 1 CPU, 2 GPU, a node labelled kind=big",
    ]


def test_workers_that_fit_one_by_one_and_not_together() -> None:
    two = [need("learner", cpus=4, node="a"), need("learner", index=1, cpus=4, node="a")]
    assert shortage(two, [node("a", cpus=4, node="a"), node("b", cpus=8)]) == [
        "no room beside the others for learner 1: 4 CPU, 0 GPU, a node labelled node=a; a has most left: 0 CPU, 0 GPU"
    ]
    assert shortage([need("rollout", cpus=3), need("teacher", cpus=3)], [node("a", cpus=5), node("b", cpus=2)]) == [
        "no room beside the others for teacher 0: 3 CPU, 0 GPU; a has most left: 2 CPU, 0 GPU"
    ]


def test_a_share_of_a_gpu_is_of_one() -> None:
    wanted = [need("rollout", index=index, gpus=0.6) for index in range(3)]
    assert shortage(wanted, [node("a", cpus=3, gpus=2)]) == [
        "no room beside the others for rollout 2: 1 CPU, 0.6 GPU; a has most left: 1 CPU, 0.4 + 0.4 GPU"
    ]
    assert shortage(wanted, [node("a", cpus=3, gpus=3)]) == []
    beside = [need("teacher", gpus=2.0), need("rollout", gpus=0.5)]
    assert shortage(beside, [node("a", cpus=2, gpus=2), node("b", gpus=0.5)]) == []
    assert len(shortage([*beside, need("learner", gpus=1.0)], [node("a", cpus=3, gpus=3), node("b", gpus=0.5)])) == 0
    assert len(shortage([*beside, need("learner", gpus=1.0)], [node("a", cpus=4, gpus=3)])) == 2


def test_shares_are_compared_as_finely_as_ray_counts() -> None:
    """It rounds 0.33334 to 0.3333, and places three."""
    assert shortage([need("rollout", gpus=0.33334) for _ in range(3)], [node("a", cpus=3, gpus=1)]) == []


def test_a_placement_that_first_fit_misses_is_not_refused() -> None:
    wanted = [need("rollout", cpus=cpus) for cpus in (4, 3, 3, 2, 2, 2)]
    assert shortage(wanted, [node("a", cpus=8), node("b", cpus=8)]) == []


def test_a_large_cluster_takes_little_time() -> None:
    ranks = [need("learner", index=index, gpus=1.0, role="learner") for index in range(129)]
    others = [need("rollout", index=index, cpus=2) for index in range(64)]
    nodes = [node(str(index), cpus=16, gpus=8, role="learner" if index < 16 else "other") for index in range(32)]
    started = time.process_time()
    assert shortage([*ranks[:-1], *others], nodes) == []
    (line,) = shortage([*ranks, *others], nodes)
    assert line.startswith("no room beside the others for learner 128: 1 CPU, 1 GPU, a node labelled role=learner; ")
    shortage([need("rollout", cpus=2 + index % 5) for index in range(33)], [node("a", cpus=12.7) for _ in range(11)])
    assert time.process_time() - started < 10.0


def can_be_placed(wanted: Sequence[Need], nodes: Sequence[Node]) -> bool:
    """Every worker on every node and every GPU of it, in all ways there are."""
    places = [
        [
            [(host.address, "CPU", one.num_cpus), *((host.address, gpu, min(one.num_gpus, 1.0)) for gpu in gpus)]
            for host in nodes
            if host.suits(one)
            for gpus in itertools.combinations(range(int(host.resources["GPU"])), math.ceil(one.num_gpus))
        ]
        for one in wanted
    ]
    for taken in itertools.product(*places):
        used: dict[tuple[str, object], Fraction] = defaultdict(Fraction)
        for address, kind, amount in itertools.chain(*taken):
            used[address, kind] += Fraction(str(amount))
        if all(
            amount <= (host.resources["CPU"] if kind == "CPU" else 1)
            for host in nodes
            for (address, kind), amount in used.items()
            if address == host.address
        ):
            return True
    return False


LABELS = st.sampled_from([{}, {"kind": "x"}, {"kind": "y"}])
NEEDS = st.builds(
    lambda cpus, gpus, labels: need("rollout", cpus=cpus, gpus=gpus, **labels),
    *(st.integers(1, 4), st.sampled_from([0.0, 0.0, 0.4, 0.5, 0.6, 1.0, 2.0]), LABELS),
)
NODES = st.tuples(st.integers(1, 8), st.integers(0, 2), LABELS)


@given(st.lists(NEEDS, max_size=4), st.lists(NODES, min_size=1, max_size=3))
def test_a_shortage_is_said_exactly_where_there_is_no_placement(
    wanted: list[Need], found: list[tuple[int, int, dict[str, str]]]
) -> None:
    nodes = [node(str(at), cpus=cpus, gpus=gpus, **labels) for at, (cpus, gpus, labels) in enumerate(found)]
    assert (shortage(wanted, nodes) == []) == can_be_placed(wanted, nodes)


def test_gpus_are_shared_so_that_the_shares_of_each_fit() -> None:
    for num_gpus, share in ((1, 1 / 3), (2, 0.5), (3, 1.0), (4, 1.0)):
        wanted = needs(load_config(DEMO), num_gpus=num_gpus)
        assert {one.num_gpus for one in wanted} == {share}
        assert shortage(wanted, [node("a", cpus=4, gpus=num_gpus)]) == []


@pytest.mark.parametrize("left", [0, 1, 2, 8])
def test_a_plan_stays_what_it_is_whatever_gpus_are_left(left: int) -> None:
    config = load_config(DEMO, [*SHARING, "rollout.num_workers=2"])
    wanted = needs(config, num_gpus=2)
    assert needs(with_gpus_of(config, wanted), num_gpus=left) == wanted
    assert {one.num_gpus for one in wanted} == {0.5}


def test_a_fleet_has_its_plan_before_it_finds_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise ConfigError("no room")

    monkeypatch.setattr(fleet, "start_ray", lambda config, say: None)
    monkeypatch.setattr(fleet, "cluster_nodes", list)
    monkeypatch.setattr(fleet, "reserve", no_room)
    monkeypatch.setattr(fleet.ray, "cluster_resources", lambda: {"GPU": 2.0})
    starting = fleet.RayFleet(load_config(DEMO, SHARING), total_updates=1)
    with pytest.raises(ConfigError, match="no room"):
        starting.start()
    assert starting.planned.resources.gpus_per_learner == 0.5


def test_workers_bound_to_labels_are_placed_before_those_that_would_take_their_nodes() -> None:
    bound = load_config(DEMO, ["learner.num_ranks=2", "resources.learner_nodes={topd/role: learner}"])
    assert [(one.role, one.index) for one in needs(bound, num_gpus=0)] == [
        ("learner", 0), ("learner", 1), ("rollout", 0), ("teacher", 0),
    ]  # fmt: skip
    assert [one.role for one in needs(load_config(DEMO), num_gpus=0)] == ["rollout", "teacher", "learner"]


def test_waiting_for_nodes_needs_the_gpus_said() -> None:
    with pytest.raises(ConfigError, match=r"resources\.gpus_per_rollout.*GPUs cannot be counted yet"):
        load_config(DEMO, ["resources.wait_seconds=60"])
    said = [f"resources.gpus_per_{role}=0" for role in ("rollout", "teacher", "learner")]
    assert load_config(DEMO, ["resources.wait_seconds=60", *said]).resources.wait_seconds == 60


def test_learner_ranks_do_not_share_a_gpu() -> None:
    two = ["learner.num_ranks=2", "rollout.samples_per_prompt=2"]
    with pytest.raises(ConfigError, match=r"resources\.gpus_per_learner, learner\.num_ranks: found 0\.5 of a GPU"):
        load_config(DEMO, [*two, "resources.gpus_per_learner=0.5"])
    assert load_config(DEMO, ["resources.gpus_per_learner=0.5"]).resources.gpus_per_learner == 0.5


SHARING = ["rollout.samples_per_prompt=4", "rollout.kv_cache_bytes=1", "teacher.kv_cache_bytes=1"]


@pytest.mark.parametrize(
    ("num_workers", "num_gpus", "share"), [(3, 1, 1 / 3), (3, 2, 0.5), (3, 3, 1), (5, 3, 0.5), (7, 2, 0.25), (4, 8, 1)]
)
def test_fewer_gpus_than_workers_hold_whole_workers(num_workers: int, num_gpus: int, share: float) -> None:
    config = load_config(DEMO, [*SHARING, f"teacher.num_workers={num_workers - 2}"])
    wanted = needs(config, num_gpus=num_gpus)
    assert [one.num_gpus for one in wanted] == [pytest.approx(share)] * num_workers
    assert num_gpus * int(1 / share + 1e-6) >= num_workers


def test_what_cannot_share_a_gpu_is_refused_also_where_the_shares_are_computed() -> None:
    two = load_config(DEMO, [*SHARING, "learner.num_ranks=2"])
    assert [one.num_gpus for one in needs(two, num_gpus=4)] == [1.0] * 4
    with pytest.raises(
        ConfigError, match=r"with 3 GPUs: resources\.gpus_per_learner.*found 0\.5 of a GPU for each of 2"
    ):
        needs(two, num_gpus=3)
    measuring = load_config(DEMO, ["teacher.kv_cache_bytes=null"])
    assert needs(measuring, num_gpus=3)
    with pytest.raises(ConfigError, match=r"teacher\.kv_cache_bytes: found 0\.5 of a GPU for an engine that sizes"):
        needs(measuring, num_gpus=2)
    with pytest.raises(ConfigError, match=r"rollout\.kv_cache_bytes: found 0\.3 of a GPU for an engine that sizes"):
        load_config(DEMO, ["rollout.kv_cache_bytes=null", "resources.gpus_per_rollout=0.3"])


@pytest.mark.parametrize("num_gpus", [0, 1, 2])
def test_weights_by_ipc_need_a_single_gpu(num_gpus: int) -> None:
    shares = [f"resources.gpus_per_{role}=0.3" for role in ("rollout", "teacher", "learner")]
    config = load_config(DEMO, [*shares, "weights.channel=ipc"])
    if num_gpus == 1:
        assert len(needs(config, num_gpus=1)) == 3
        return
    with pytest.raises(ConfigError, match=f"weights.channel: found ipc where Ray has {num_gpus} GPUs"):
        needs(config, num_gpus=num_gpus)


def test_a_run_folder_in_rays_copy_of_the_working_directory() -> None:
    check_run_folder(Path("/shared/runs/one"))
    with pytest.raises(ConfigError, match="Ray's own temporary copy"):
        check_run_folder(Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs/one"))


def test_facts_of_this_node(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.write_text("seen")
    facts = node_facts.look([str(tmp_path), "/nowhere"], str(marker), "seen")
    assert facts.missing_folders == ("/nowhere",) and facts.sees_marker
    assert re.fullmatch(r"[0-9a-f]{12}", facts.versions["topd_ray"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts.versions["ray"])
    assert not node_facts.look([], str(marker), "other").sees_marker
    assert not node_facts.look([], str(tmp_path / "none"), "seen").sees_marker


def test_nodes_that_do_not_fit_together() -> None:
    own = {"python": "3.11.7", "ray": "2.60.0"}

    def answer(address: str, role: str, **facts: object) -> Answer:
        known = {"versions": own, "missing_folders": (), "sees_marker": True, **facts}
        return Answer(address=address, roles=frozenset([role]), facts=node_facts.NodeFacts(**known))  # type: ignore[arg-type]

    assert problems_of([answer("a", "learner"), answer("b", "rollout", sees_marker=False)], own, Path("/r")) == []
    lines = problems_of(
        [
            answer("a", "learner", sees_marker=False),
            answer("b", "teacher", versions={**own, "ray": "2.59.0"}, missing_folders=("/m",)),
        ],
        own,
        Path("/r"),
    )
    assert [line.partition(";")[0] for line in lines] == [
        "a does not see the run folder /r, to which its learner ranks write checkpoints",
        "b has ray 2.59.0 (here 2.60.0)",
        "b has no model folder /m",
    ]


def test_interfaces_are_found_by_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(LearnerError, match=r"no network interface with the address 203\.0\.113\.9"):
        interface_of("203.0.113.9")
