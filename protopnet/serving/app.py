"""The application: one deployment for HTTP, and one for each member of the ensemble.

serve run serve/config.yaml
serve run serve.app:build bundles=runs/a/bundle,runs/b/bundle
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from protopnet import storage
from protopnet.machine import usable_cpus
from protopnet.model.bundle import read_info
from protopnet.model.calibration import Trust
from protopnet.predictor import check_one_task
from protopnet.serving.audit import check_folder
from protopnet.serving.ingress import Ingress
from protopnet.serving.keys import read_keys
from protopnet.serving.members import BundleRef, Member
from protopnet.serving.settings import AppSettings, IngressSettings, MemberSettings

NAME = "protopnet"  # of the Serve application

_HEALTH_TIMEOUT_S = 30
_DRAINING_S = 1  # how often a replica that is told to stop looks whether it has answered all it has taken on
# Beside the requests with images that the ingress counts itself: those whose bodies are on their way or never come, those
# for pages and pictures, and those it refuses.
_OTHER_REQUESTS = 1000


def build(args: AppSettings) -> Application:
    """The Serve application of these settings. `UserError` where a bundle is none, or they don't go together."""
    if args.token_file is not None:
        read_keys(args.token_file)
    if args.audit_log is not None:
        check_folder(args.audit_log)
    if args.batch is not None:
        storage.check_writable(args.batch.output, "batch.output")
    # Replicas may work in another folder than this process.
    located: dict[str, Any] = {
        name: storage.located(uri) for name in ("token_file", "audit_log") if (uri := getattr(args, name))
    }
    if args.batch is not None:
        places = {"inputs": list(map(storage.located, args.batch.inputs)), "output": storage.located(args.batch.output)}
        located["batch"] = args.batch.model_copy(update=places)
    args = args.model_copy(update=located)
    bundles, shadow = _served(args)
    Trust.of([read_info(uri)[0].calibration for uri in args.bundles]).threshold(args.abstain_below, "abstain_below")
    threads = args.member.threads or max(1, usable_cpus() // (len(bundles + shadow) * args.member.max_replicas))
    member = serve.deployment(**_member_options(args))(Member)
    names = [f"{kind}-{n}" for kind, refs in (("member", bundles), ("shadow", shadow)) for n in range(len(refs))]
    members = [
        member.options(name=name).bind(bundle, args.member, threads)
        for name, bundle in zip(names, bundles + shadow, strict=True)
    ]
    ingress = serve.deployment(**_ingress_options(args))(serve.ingress()(Ingress))
    return ingress.options(name="ingress").bind(args, bundles, shadow, *members)


def _served(args: AppSettings) -> tuple[list[BundleRef], list[BundleRef]]:
    """The bundles served, and those of the shadow."""
    all_of_them = references([*args.bundles, *args.shadow])
    count = len(args.bundles)
    return all_of_them[:count], all_of_them[count:]


def references(uris: Sequence[str]) -> list[BundleRef]:
    """The bundles with their hashes, from the smallest of their files. Raises `UserError`."""
    read = [read_info(uri) for uri in uris]
    check_one_task([info for info, _ in read])
    hashes = [hashlib.sha256(written).hexdigest() for _, written in read]
    return [BundleRef(storage.located(uri), digest) for uri, digest in zip(uris, hashes, strict=True)]


def _member_options(args: AppSettings) -> dict[str, Any]:
    member = args.member
    return {
        # Calls, each a batch: one in work and one that waits for each ingress, and as many again while routers differ.
        "max_ongoing_requests": 4 * args.ingress.max_replicas,
        "max_queued_requests": member.max_queue,
        "ray_actor_options": {"num_cpus": member.cpus, "num_gpus": member.gpus},
        **_replicas(member),
        **_life(args),
    }


def _ingress_options(args: AppSettings) -> dict[str, Any]:
    ongoing = args.ingress.max_requests + _OTHER_REQUESTS
    return {
        "max_ongoing_requests": ongoing,
        "max_queued_requests": 4 * ongoing,
        "backpressure_config": BackpressureConfig(retry_after_s=1),
        "ray_actor_options": {"num_cpus": args.ingress.cpus},
        **_replicas(args.ingress),
        **_life(args),
    }


def _replicas(settings: MemberSettings | IngressSettings) -> dict[str, Any]:
    if settings.min_replicas == settings.max_replicas:
        return {"num_replicas": settings.min_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing,
        )
    }


def _life(args: AppSettings) -> dict[str, Any]:
    """How replicas are looked after, replaced and stopped."""
    return {
        # A new version's replica is up before an old one stops, even where there is only one.
        "max_surge_percent": 100,
        "health_check_period_s": args.health_period_s,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": _DRAINING_S,
        "graceful_shutdown_timeout_s": args.body_timeout_s + args.timeout_s + 2 * _DRAINING_S,
        "logging_config": {"encoding": "JSON"},
    }
