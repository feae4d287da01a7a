"""Every setting of the service: the `args` of `serve/config.yaml`, and the options of `python -m serve`."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from protopnet.config import Section, Threshold
from protopnet.evidence.sources import Named
from protopnet.imaging import BYTES_A_PIXEL, MAX_PIXELS

SMALL_PART = 8  # one in so many bytes for decoding is for small images alone


class MemberSettings(Section):
    """A member of the ensemble: one bundle, as a deployment of its own."""

    cpus: float = Field(
        0.1, ge=0, description="CPUs that Ray keeps for a replica; bookkeeping, it limits nothing (see threads)"
    )
    gpus: float = Field(0, ge=0, description="GPUs a replica takes, parts of one too (0.25); 0: it computes on CPUs")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a forward pass; the cores shared out among all replicas when left out"
    )
    max_batch: int = Field(16, ge=1, le=1024, description="images a forward pass at most")
    batch_wait_s: float = Field(
        0.002, ge=0, le=1, description="how long an image waits for company; while passes are running some more"
    )
    max_queue: int = Field(
        256, ge=1, description="images that may wait for a member in each ingress replica; more get 503"
    )
    min_replicas: int = Field(1, ge=1, description="replicas when there is little to do")
    max_replicas: int = Field(1, ge=1, description="replicas when there is much to do")
    target_ongoing: float = Field(
        1.5, gt=0, description="autoscaling: calls in work or waiting that each replica should have; a call is a batch"
    )

    @model_validator(mode="after")
    def _range(self) -> "MemberSettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError("member.max_replicas must be at least member.min_replicas")
        return self


class IngressSettings(Section):
    """What speaks HTTP: reads and decodes images, asks the members, adds up, explains."""

    cpus: float = Field(0.1, ge=0, description="CPUs that Ray keeps for a replica")
    threads: int = Field(2, ge=1, description="threads that decode images, and as many that explain")
    max_requests: int = Field(
        64,
        ge=1,
        description="requests with images in work at a time, a replica, from when their body is there; more get 503",
    )
    body_memory: int = Field(
        256_000_000, ge=1024, description="bytes of bodies that a replica holds at a time; what comes above gets 503"
    )
    decode_memory: int = Field(
        1_400_000_000,
        ge=1,
        description=f"bytes that decoding takes at a time, {BYTES_A_PIXEL} a pixel of the image, others wait; one in "
        f"{SMALL_PART} is for small images alone",
    )
    min_replicas: int = Field(1, ge=1, description="replicas when there is little to do")
    max_replicas: int = Field(1, ge=1, description="replicas when there is much to do")
    target_ongoing: float = Field(
        32, gt=0, description="autoscaling: requests in work that each replica should have on average"
    )

    @model_validator(mode="after")
    def _range(self) -> "IngressSettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError("ingress.max_replicas must be at least ingress.min_replicas")
        return self


class BatchSettings(Section):
    """Bulk scoring over the API; off unless it is given."""

    inputs: list[str] = Field(
        min_length=1, description="folders and buckets' prefixes below which the inputs of batches may lie"
    )
    output: str = Field(description="folder or bucket's prefix for the results, which all nodes can write")
    at_once: int = Field(1, ge=1, description="batches that run at a time on this cluster; more get 503")


class AppSettings(Section):
    """What is served, and within which limits."""

    bundles: list[str] = Field(
        ["runs/quickstart/bundle"],
        min_length=1,
        description="folders of the bundles, local paths or s3://…; several make an ensemble, their logits are added up",
    )
    shadow: list[str] = Field(
        [],
        description="bundles of the same classes that answer beside those served, unseen by clients: whether they say the "
        "same is counted (`/v1/watch`, `/metrics`)",
    )
    max_bytes: int = Field(20_000_000, ge=1024, description="largest body of a request in bytes; above it 413")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="largest image in pixels (width x height); above it 413")
    max_images: int = Field(16, ge=1, le=256, description="images in one request at most; above it 413")
    max_total_pixels: int = Field(
        4 * MAX_PIXELS, ge=1, description="pixels of all images of a request together; above it 413"
    )
    max_evidence: int = Field(
        1000,
        ge=1,
        description="images x classes x prototypes that a request may ask evidence for, four times as much where "
        "with maps; above it 422",
    )
    max_answer_bytes: int = Field(
        20_000_000, ge=1024, description="largest answer in bytes, as estimated from what is asked for; above it 422"
    )
    timeout_s: float = Field(
        30, gt=0, description="a request is answered within this many seconds of its body, or with 504"
    )
    body_timeout_s: float = Field(60, gt=0, description="a body has come within this many seconds, or 408")
    min_rate: int = Field(
        10_000, ge=1, description="bytes a second with which a body must come, after its first seconds; else 408"
    )
    sources: Named = Field(
        "names",
        description="what is said of training images: full: their locations; names: relative to the data's root; none: "
        "nothing, and of their pictures the prototypes alone",
    )
    crops_only: bool = Field(False, description="of the pictures of training images the prototypes alone")
    token_file: str | None = Field(
        None,
        description="file with the bearer tokens that open the API, one a line, after it a name and limits: "
        "`TOKEN pathology a_minute=120 at_once=4`; read again when it changes; the API is open to all who reach it "
        "when left out",
    )
    audit_log: str | None = Field(
        None,
        description="local folder for a line of JSON a request: which key asked what, when, which bundles answered",
    )
    cors_origins: list[str] = Field(
        [], description="origins (https://example.org) whose pages may call the API from a browser"
    )
    health_period_s: float = Field(
        5, gt=0, description="how often a replica is asked for its health; after three failures it is replaced"
    )
    abstain_below: Threshold | None = Field(
        None,
        description="abstain where the best class's probability is lower than this; bundle: lower than what the bundle "
        "keeps for the accuracy that was wanted of it",
    )
    batch: BatchSettings | None = Field(None, description="bulk scoring over the API (`/v1/batch`); off when left out")
    member: MemberSettings = MemberSettings()
    ingress: IngressSettings = IngressSettings()

    @model_validator(mode="after")
    def _room_for_the_largest(self) -> "AppSettings":
        needed = -(-BYTES_A_PIXEL * self.max_pixels * SMALL_PART // (SMALL_PART - 1))
        if self.ingress.decode_memory < needed:
            raise ValueError(f"ingress.decode_memory must be at least {needed}, for one image of max_pixels")
        if self.ingress.body_memory < self.max_bytes:
            raise ValueError("ingress.body_memory must be at least max_bytes")
        return self

    @field_validator("bundles", "shadow", "cors_origins", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`serve run serve.app:build bundles=a,b` hands over texts."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
