"""The sinks of a run, Ray's metrics among them."""

from pathlib import Path

from topd_ray.config.schema import TopdConfig
from topd_ray.metrics.sinks import Sink, Sinks


def open_sinks(config: TopdConfig, *, resume_step: int) -> Sinks:
    """What `config.metrics` asks for, in the run's folder; the run goes on after update `resume_step`."""
    more: list[Sink] = []
    if config.metrics.prometheus:
        from topd_ray.actors.prometheus import PrometheusSink

        more.append(PrometheusSink(Path(config.run.root), config.run.name))
    return Sinks.open(config.metrics, config.run.folder, resume_step=resume_step, more=more)
