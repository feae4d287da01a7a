"""What is served, and the prototypes of it, to be looked through."""

import asyncio
import hashlib

import numpy as np

from protopnet.errors import UserError
from protopnet.pages import pictures
from protopnet.serving.ensemble import Ensemble
from protopnet.serving.refusals import Refusal
from protopnet.serving.schemas import (
    ClassOptions,
    ClassPage,
    Connection,
    Limits,
    Model,
    ModelClass,
    ModelMember,
    Prototype,
    PrototypeDetail,
    PrototypeOptions,
    PrototypePage,
)
from protopnet.serving.settings import AppSettings
from protopnet.words import find_class, readable_names

_STRONGEST = 10


class Catalogue:
    """Of an ensemble. Raises `Refusal` for what there isn't."""

    def __init__(self, ensemble: Ensemble, settings: AppSettings) -> None:
        self._ensemble, self._settings = ensemble, settings
        self._explainer = ensemble.explainer
        # With a baseline among the members nothing is explained, and there are no prototypes to look at.
        explains = self._explainer is not None
        self._of_class = [
            np.array((info.prototype_class or []) if explains else [], np.int64) for info in ensemble.infos
        ]
        # Of all prototypes N, in the order (class, member, prototype).
        member_N = np.repeat(np.arange(len(self._of_class)), [len(classes_P) for classes_P in self._of_class])
        prototype_N = np.concatenate([np.arange(len(classes_P)) for classes_P in self._of_class])
        class_N = np.concatenate(self._of_class)
        order_N = np.lexsort((prototype_N, member_N, class_N))
        self._member_N, self._prototype_N, self._class_N = member_N[order_N], prototype_N[order_N], class_N[order_N]
        self._labels = {name: label for label, name in reversed(list(enumerate(ensemble.classes)))}
        self.model = self._model()
        self.model_json = self.model.model_dump_json()
        self._searched = [f"{each.readable_name}\n{each.class_name}".casefold() for each in self.model.classes]

    async def label(self, text: str) -> int:
        """Of the class that is meant. Looking for one that is called otherwise takes a while where there are many."""
        if (label := self._labels.get(text)) is not None:
            return label
        try:
            return await asyncio.to_thread(find_class, text, self._ensemble.classes)
        except UserError as error:
            raise Refusal("unknown_class", str(error)) from None

    def classes(self, options: ClassOptions) -> ClassPage:
        wanted = options.search.strip().casefold()
        found = [label for label, names in enumerate(self._searched) if wanted in names]
        if wanted:
            found.sort(key=lambda label: not any(name.startswith(wanted) for name in self._searched[label].split("\n")))
        end = options.offset + options.limit
        return ClassPage(
            total=len(found),
            offset=options.offset,
            limit=options.limit,
            next=end if end < len(found) else None,
            classes=[self.model.classes[label] for label in found[options.offset : end]],
        )

    async def page(self, options: PrototypeOptions) -> PrototypePage:
        if options.member is not None and options.member >= len(self._of_class):
            raise self._unknown_member(options.member)
        first, last = 0, len(self._class_N)
        if options.of_class is not None:
            label = await self.label(options.of_class)
            first, last = np.searchsorted(self._class_N, [label, label + 1]).tolist()
        found_n = np.arange(first, last)
        if options.member is not None:
            found_n = found_n[self._member_N[first:last] == options.member]
        end = options.offset + options.limit
        places_n = found_n[options.offset : end]
        members, prototypes = self._member_N[places_n].tolist(), self._prototype_N[places_n].tolist()
        return PrototypePage(
            total=len(found_n),
            offset=options.offset,
            limit=options.limit,
            next=end if end < len(found_n) else None,
            prototypes=[Prototype(**self._prototype(m, p)) for m, p in zip(members, prototypes, strict=True)],
        )

    def detail(self, member: int, prototype: int) -> PrototypeDetail:
        self._check(member, prototype)
        assert self._explainer is not None
        weights_K = self._explainer.heads[member].weights_KP[:, prototype]
        strongest = weights_K.abs().sort(descending=True, stable=True).indices[:_STRONGEST].tolist()
        return PrototypeDetail(
            **self._prototype(member, prototype),
            activation_map=self._explainer.sources[member].self_activation(prototype),
            connections=[
                Connection(class_=k, class_name=self._ensemble.classes[k], connection=float(weights_K[k]))
                for k in strongest
            ],
        )

    def thumbnail(self, member: int, prototype: int) -> bytes:
        """JPEG of the training image."""
        self._check(member, prototype)
        assert self._explainer is not None
        jpeg = self._explainer.thumbnail(member, prototype)
        if jpeg is None:
            raise Refusal("no_picture", f"the bundle of member {member} has no picture of prototype {prototype}")
        return jpeg

    def crop(self, member: int, prototype: int) -> bytes:
        """JPEG of the prototype alone."""
        image = pictures.opened(self.thumbnail(member, prototype))
        assert self._explainer is not None
        source = self._explainer.source(member, prototype)
        assert source is not None  # as there is a thumbnail
        return pictures.encoded(pictures.crop(image, source.box, (source.width, source.height)))

    def etag(self, *what: object) -> str:
        """Of a picture: it changes with the bundles, and with what may be shown of them."""
        shown = (self._settings.sources, self._settings.crops_only)
        return f'"{hashlib.sha256(repr((self._ensemble.hash, shown, what)).encode()).hexdigest()[:24]}"'

    def _check(self, member: int, prototype: int) -> None:
        if not 0 <= member < len(self._of_class):
            raise self._unknown_member(member)
        count = len(self._of_class[member])
        if self._explainer is None or not 0 <= prototype < count:
            raise Refusal(
                "unknown_prototype", f"member {member} has {count} prototypes, counted from 0: no {prototype}"
            )

    def _unknown_member(self, member: int) -> Refusal:
        count = len(self._of_class)
        return Refusal("unknown_prototype", f"there are {count} members, counted from 0: no {member}")

    def _prototype(self, member: int, prototype: int) -> dict[str, object]:
        assert self._explainer is not None
        label = int(self._of_class[member][prototype])
        source = self._explainer.source(member, prototype)
        path = f"v1/prototypes/{member}/{prototype}"
        pictured = self._explainer.sources[member].pictured(prototype)
        return {
            "member": member,
            "prototype": prototype,
            "class_": label,
            "class_name": self._ensemble.classes[label],
            **self._explainer.called(member, prototype),
            "connection": float(self._explainer.heads[member].weights_KP[label, prototype]),
            "source": source,
            "thumbnail": f"{path}/thumbnail" if pictured else None,
            "crop": f"{path}/crop" if pictured else None,
        }

    def _model(self) -> Model:
        ensemble, settings = self._ensemble, self._settings
        count_K = np.bincount(self._class_N, minlength=len(ensemble.classes)).tolist()
        names = zip(ensemble.classes, readable_names(ensemble.classes), strict=True)
        members = zip(ensemble.refs, ensemble.infos, strict=True)
        return Model(
            model=ensemble.hash,
            image_size=max(ensemble.sizes),
            explains=self._explainer is not None,
            classes=[
                ModelClass(class_=k, class_name=name, readable_name=readable, prototypes=count_K[k])
                for k, (name, readable) in enumerate(names)
            ],
            members=[
                ModelMember(
                    member=m,
                    name=_name(ref.uri),
                    bundle_hash=ref.hash,
                    backbone=info.architecture.backbone,
                    similarity=info.similarity if info.prototype_class is not None else None,
                    prototypes=len(self._of_class[m]),
                )
                for m, (ref, info) in enumerate(members)
            ],
            prototypes=len(self._class_N),
            abstain_below=ensemble.trust.threshold(settings.abstain_below, "abstain_below"),
            limits=Limits(**settings.model_dump(include=set(Limits.model_fields))),
        )


def _name(uri: str) -> str:
    """Of a bundle for people: the run it comes from. Not its whole path, which is nobody's business."""
    parts = [part for part in uri.rstrip("/").split("/") if part]
    return parts[-2] if len(parts) > 1 and parts[-1] == "bundle" else parts[-1]
