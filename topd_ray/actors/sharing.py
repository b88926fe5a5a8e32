"""How work is shared out among workers of a kind, and how their answers are put together."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from topd_ray.actors.messages import GuidedItem
from topd_ray.engines.packing import balance, cost
from topd_ray.errors import WeightSyncError
from topd_ray.types import Metric, RolloutRequest, UpdateReport
from topd_ray.weights.bundle import WeightsBundle
from topd_ray.weights.checksum import WeightReceipt

Item = TypeVar("Item")


class WithRequest(Protocol):
    """Something that stands for one rollout."""

    @property
    def request(self) -> RolloutRequest: ...


HasRequest = TypeVar("HasRequest", bound=WithRequest)


def split_evenly(items: Sequence[Item], num_shares: int) -> list[Sequence[Item]]:
    """Every n-th item to the n-th worker; workers without an item are left out."""
    return [share for i in range(num_shares) if (share := items[i::num_shares])]


def by_prompt(tasks: Iterable[HasRequest]) -> list[list[HasRequest]]:
    """The samples of each prompt together, prompts in the order of their first."""
    prompts: dict[tuple[str, int], list[HasRequest]] = {}
    for task in tasks:
        prompts.setdefault((task.request.prompt.prompt_id, task.request.epoch), []).append(task)
    return list(prompts.values())


def split_requests(requests: Sequence[RolloutRequest], num_workers: int) -> list[list[RolloutRequest]]:
    """Whole prompts to the rollout workers, so that the samples of a prompt share its prefix cache."""
    prompts = list(dict.fromkeys((request.prompt.prompt_id, request.epoch) for request in requests))
    worker_of = {key: index % num_workers for index, key in enumerate(prompts)}
    shares: list[list[RolloutRequest]] = [[] for _ in range(num_workers)]
    for request in requests:
        shares[worker_of[request.prompt.prompt_id, request.epoch]].append(request)
    return [share for share in shares if share]


def balance_ranks(items: Sequence[GuidedItem], num_ranks: int) -> list[list[GuidedItem]]:
    """Shares of about equal compute (`engines.packing.cost`), not of equally many trajectories; see `balance`."""
    ordered = sorted(items, key=lambda item: item.trajectory_id)
    shares = balance([cost(item.num_sequence_tokens) for item in ordered], num_ranks)
    return [[ordered[index] for index in sorted(share)] for share in shares]


def merge_reports(reports: Sequence[UpdateReport]) -> UpdateReport:
    """The ranks' metrics as one report."""
    metrics: list[Metric] = [metric for report in reports for metric in report.metrics]
    return UpdateReport(policy_version=reports[0].policy_version, metrics=metrics)


def check_receipt(worker: int, bundles: Sequence[WeightsBundle], receipt: WeightReceipt) -> int:
    """The version that rollout worker `worker` acknowledged; WeightSyncError if it is of none of `bundles`."""
    if (receipt.version, receipt.checksum) not in [(bundle.version, bundle.checksum) for bundle in bundles]:
        published = ", ".join(f"version {bundle.version} (checksum {bundle.checksum:#x})" for bundle in bundles)
        raise WeightSyncError(
            f"rollout worker {worker} serves version {receipt.version} (checksum {receipt.checksum:#x}), "
            f"the learner published {published}"
        )
    return receipt.version
