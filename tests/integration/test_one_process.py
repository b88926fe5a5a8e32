"""Student and teacher engines, and other users of torch.distributed, in one process (`--inline`)."""

import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.tiny import EOS_ID, load_tiny_model, make_requests, make_tiny_model, plain_greedy
from topd_ray.config.schema import RolloutConfig, StudentConfig, TeacherConfig
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.engines.teacher import TeacherEngine
from topd_ray.objective import exact_transport


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return make_tiny_model(root / "student", seed=0, tied=True), make_tiny_model(root / "teacher", seed=1)


def build_student(folder: Path) -> RolloutEngine:
    rollout = RolloutConfig(
        max_new_tokens=8, max_num_seqs=8, max_batched_tokens=64, kv_cache_bytes=4 * 1024**2, enforce_eager=True
    )
    student = StudentConfig(model=str(folder), dtype="float32")
    return RolloutEngine(student, rollout, max_prompt_tokens=8, max_new_tokens=8, threads=1, seed=0)


def build_teacher(folder: Path) -> TeacherEngine:
    teacher = TeacherConfig(
        model=str(folder),
        dtype="float32",
        max_num_seqs=8,
        max_batched_tokens=64,
        kv_cache_bytes=4 * 1024**2,
        enforce_eager=True,
    )
    return TeacherEngine(teacher, temperature=1.0, max_model_len=32, window=8, threads=1, seed=0)


def greedy(engine: RolloutEngine | TeacherEngine) -> list[int]:
    ((_, ((token_ids, _),)),) = engine.complete(
        [make_requests(1)[0].prompt], num_samples=1, temperature=0.0, top_p=1.0, max_new_tokens=8, seed=0
    )
    return token_ids


def plain(folder: Path) -> list[int]:
    return plain_greedy(load_tiny_model(folder), make_requests(1)[0].prompt.token_ids, 8)


def test_two_engines_answer_each_as_their_own_model(folders):
    student_folder, teacher_folder = folders
    assert not dist.is_initialized(), "nobody before left a process group"
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    with build_student(student_folder) as student:
        with build_teacher(teacher_folder) as teacher:
            for _ in range(2):
                assert greedy(student) == plain(student_folder)
                assert greedy(teacher) == plain(teacher_folder)
            student.update_weights(1, load_file(student_folder / "model.safetensors").items())
            assert greedy(teacher) == plain(teacher_folder)
        assert greedy(student) == plain(student_folder), "the student outlives the teacher"
        with build_teacher(teacher_folder) as teacher:
            assert greedy(teacher) == plain(teacher_folder), "a second teacher beside the student"
    assert not dist.is_initialized(), "the last engine takes the group it made with it"
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= children


def test_an_engine_is_built_where_the_transport_solver_is_loaded(folders):
    assert exact_transport([[[0.25, 1.0], [1.0, 0.25]]]).distance_M.item() == 0.25
    assert "llvmlite.binding.ffi" in sys.modules
    with build_student(folders[0]) as student:
        assert greedy(student) == plain(folders[0])
    assert exact_transport([[[0.5]]]).distance_M.item() == 0.5


def test_a_group_that_was_there_before_stays(folders, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with build_student(folders[0]) as student, build_teacher(folders[1]) as teacher:
            check_distributed()
            assert greedy(student) == plain(folders[0])
            assert greedy(teacher) == plain(folders[1])
        check_distributed()
    finally:
        dist.destroy_process_group()


def test_somebody_may_use_the_group_the_engines_made(folders):
    with build_student(folders[0]) as student:
        assert (dist.get_backend(), dist.get_world_size()) == ("gloo", 1)
        check_distributed()
        assert greedy(student) == plain(folders[0])


def test_a_stream_of_one_engine_may_wait_while_the_other_works(folders):
    with build_student(folders[0]) as student, build_teacher(folders[1]) as teacher:
        expected = {one.trajectory_id: one.response_ids.tolist() for one in student.generate(make_requests(8))}
        found = {}
        for trajectory in student.generate(make_requests(8)):
            (score,) = teacher.score([(trajectory.prompt_ids, trajectory.response_ids)], 3)
            assert score.topk_ids.shape == (trajectory.num_response_tokens, 3)
            found[trajectory.trajectory_id] = trajectory.response_ids.tolist()
        assert found == expected
        assert all(EOS_ID not in ids[:-1] for ids in found.values())


def test_shutdown_twice_is_once(folders):
    engine = build_student(folders[0])
    with build_teacher(folders[1]) as teacher:
        engine.shutdown()
        engine.shutdown()
        assert greedy(teacher) == plain(folders[1])
    assert not dist.is_initialized()


def check_distributed() -> None:
    """The default group and a new one reduce as they should."""
    group = dist.new_group([0])
    for where in (None, group):
        value = torch.tensor([3.0])
        dist.all_reduce(value, group=where)
        assert value.item() == 3.0
    dist.barrier()
