"""One vector for both searches: the joint embedding, and dimensions appended for image search.

    v(image) = [x; w z] / sqrt(1 + w^2)        x, z: unit vectors, D and r wide; w: `weight`
    v(text)  = [t; 0]

x and t are the joint embeddings of an open_clip model, z comes from an image tower tuned for image
search. A text's score is <t, x> / sqrt(1 + w^2), the joint model's own times a constant: text search,
zero-shot and captions rank as they did, on every domain. Images are compared by
(<x, x'> + w^2 <z, z'>) / (1 + w^2).

Outside of the domain that z was trained on, z is worse than x. So a picture query leaves out as much
of z as it lies outside: see `Gate`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pymcip.errors import CheckpointError
from pymcip.files import atomic_path, fingerprint
from pymcip.model.clip import ClipModel, weights_fingerprint

APPENDED = "appended.safetensors"  # beside the joint model's weights
VERSION = 2
AFTER_BLOCKS = (
    "proj", "ln_post.", "attn_pool.", "head.", "trunk.norm.", "trunk.fc_norm.", "trunk.head.",
    "trunk.conv_head.", "trunk.bn2.", "trunk.attn_pool.", "trunk.final_conv.",
)  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """How much of the appended dimensions a picture query uses.

    The strength is sigmoid((s - centre) / width), between 0 and 1, with s the largest cosine of the
    query's joint embedding to a prototype. Far from everything that was trained on it is 0, and the
    query searches as with the joint model.

    Attributes:
        prototypes: float32 [C, D], unit: mean joint embeddings of training classes.
        centre: the cosine at which the strength is one half.
        width: by how much the cosine must rise from there for a strength of 0.73.
    """

    prototypes: Tensor
    centre: float
    width: float

    def strength(self, joint: Tensor) -> Tensor:
        """Strengths float32 [N] of unit joint embeddings [N, D]."""
        nearest = (joint.float() @ self.prototypes.to(joint.device).T).amax(dim=1)
        return torch.sigmoid((nearest - self.centre) / self.width)


def linear_head(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with this weight [r, D'] and bias [r], which is not trained."""
    head = nn.Linear(weight.shape[1], weight.shape[0], device="meta").requires_grad_(False)
    head.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return head


def joined(joint: Tensor, features: Tensor, head: nn.Linear, weight: float) -> Tensor:
    """Unit vectors [N, D + r] of images: their joint embeddings [N, D], and `features` through the head."""
    appended = nn.functional.normalize(head(features), dim=-1)
    return torch.cat([joint, weight * appended], dim=1) / math.hypot(1, weight)


def with_strength(vectors: Tensor, strength: Tensor, dims: int) -> Tensor:
    """Vectors [N, D + r] whose last `dims` columns are multiplied by the row's strength [N]."""
    joint, appended = vectors.float().split([vectors.shape[1] - dims, dims], dim=1)
    return torch.cat([joint, strength[:, None] * appended], dim=1)


@dataclass
class AppendedClip(ClipModel):
    """A joint open_clip model whose images also have dimensions appended for image search.

    Attributes:
        tower: the image tower of z; None: z is made of the joint embedding itself.
        head: maps the tower's unit features [B, D'] to r numbers; of unit length, they are z. float32.
        weight: w, how much z counts beside x in a comparison of images.
        gate: how much of z a query uses.
    """

    tower: nn.Module | None
    head: nn.Linear
    weight: float
    gate: Gate

    @property
    def embed_dim(self) -> int:
        """Width D + r of the vectors."""
        return self.joint_dim + self.head.out_features

    def image_features(self, images: Tensor) -> Tensor:
        """Unit fp32 vectors [B, D + r] of preprocessed images [B, 3, H, W]."""
        joint = super().image_features(images)
        features = joint if self.tower is None else self._unit(self.tower, images)
        return joined(joint, features, self.head, self.weight)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Unit fp32 vectors [B, D + r] of token ids [B, L]; the last r are 0."""
        return nn.functional.pad(super().text_features(tokens), (0, self.head.out_features))

    def as_queries(self, vectors: Tensor, strength: float | None = None) -> Tensor:
        """Vectors to search with by inner product, float32 [N, D + r], of stored ones [N, D + r].

        Args:
            vectors: of images or texts; a text's stays as it is.
            strength: of the appended dimensions, 0 (the joint model alone) to 1; default: by the gate.
        """
        if strength is None:
            joint = vectors[:, : self.joint_dim].float()
            by_row = self.gate.strength(nn.functional.normalize(joint, dim=1))
        else:
            by_row = torch.full((len(vectors),), strength, device=vectors.device)
        return with_strength(vectors, by_row, self.head.out_features)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the head and of the gate, by name."""
        head = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        return {**head, "gate.prototypes": self.gate.prototypes}

    def joint(self) -> ClipModel:
        """The joint model alone, of vectors [N, D]; it shares this one's weights."""
        return ClipModel(**{item.name: getattr(self, item.name) for item in fields(ClipModel)})

    def fingerprint(self, part: str = "model", weights: str | None = None) -> str:
        """SHA-256 of weights and of what decides a vector beside them; see `ClipModel`."""
        described: list[Any] = [super().fingerprint(part, weights), self.head.out_features]
        if part != "text":
            state = {} if self.tower is None else dict(self.tower.state_dict())
            state |= {
                f"appended.head.{name}": value for name, value in self.head.state_dict().items()
            }
            described += [weights_fingerprint(state), self.weight]
        return fingerprint(described)


def write_appended(clip: AppendedClip, folder: Path) -> None:
    """Write what `clip` has beside its joint model into `folder`, the hub-style folder of that.

    Tensors of the tower that are equal to the joint model's are left out.
    """
    tensors = clip.tensors()
    if clip.tower is not None:
        own = _differing(clip.model.visual, clip.tower)  # type: ignore[arg-type]
        tensors |= {f"tower.{name}": value for name, value in own.items()}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    about = {
        "version": VERSION,
        "tower": "joint" if clip.tower is None else "own",
        "weight": clip.weight,
        "gate": [clip.gate.centre, clip.gate.width],
    }
    # In one value, because safetensors writes several in an order that differs from call to call.
    with atomic_path(folder / APPENDED) as temporary:
        safetensors.torch.save_file(plain, temporary, metadata={"about": json.dumps(about)})


def with_appended(clip: ClipModel, folder: Path) -> ClipModel:
    """The model with the dimensions that `write_appended` left in `folder`; `clip` if there are none.

    Raises:
        CheckpointError: the file is damaged, of another version, or of another model.
    """
    path = folder / APPENDED
    if not path.is_file():
        return clip
    try:
        with safetensors.safe_open(path, "pt", device=str(clip.device)) as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["version"] != VERSION:
            raise ValueError(f"its version is {about['version']}, not {VERSION}")
        head = linear_head(tensors.pop("head.weight"), tensors.pop("head.bias"))
        prototypes = tensors.pop("gate.prototypes")
        tower: nn.Module | None = None
        if about["tower"] == "own":
            tower = copy.deepcopy(clip.model.visual)  # type: ignore[assignment]
            state = {name.removeprefix("tower."): value for name, value in tensors.items()}
            unknown = tower.load_state_dict(state, strict=False).unexpected_keys  # type: ignore[union-attr]
            if unknown:
                raise ValueError(f"the joint model's image tower has no {unknown[0]}")
        gate = Gate(prototypes, *about["gate"])
        return appended_clip(clip, tower, head, about["weight"], gate)
    except Exception as error:  # what a damaged file raises is not bounded by a list
        raise CheckpointError(
            f"{path} can't be read as appended dimensions of {clip.name}: "
            f"{str(error).splitlines()[0]}. Export the run again, or delete the file to use the "
            "joint model alone"
        ) from error


def appended_clip(
    clip: ClipModel, tower: nn.Module | None, head: nn.Linear, weight: float, gate: Gate
) -> AppendedClip:
    """Put a model together; blocks that `tower` has in common with the joint tower run once.

    Args:
        clip: the joint model.
        tower: an image tower of the same architecture, changed in place; None: the joint one.
        head, weight, gate: see `AppendedClip`.
    """
    if tower is not None:
        tower.eval()
        share_blocks(clip.model.visual, tower)  # type: ignore[arg-type]
    own = {item.name: getattr(clip, item.name) for item in fields(ClipModel)}
    return AppendedClip(**own, tower=tower, head=head.to(clip.device), weight=weight, gate=gate)


def fp32_on_cpu(clip: ClipModel) -> ClipModel:
    """A copy of the model that runs in fp32 on the CPU."""
    memo: dict[int, Any] = {}  # one for both towers: blocks that are shared stay so
    changed: dict[str, Any] = {"model": copy.deepcopy(clip.model, memo).float().cpu().eval()}
    if isinstance(clip, AppendedClip):
        changed["head"] = copy.deepcopy(clip.head).cpu()
        if clip.tower is not None:
            changed["tower"] = copy.deepcopy(clip.tower, memo).float().cpu().eval()
    return replace(clip, device=torch.device("cpu"), precision="fp32", **changed)


def share_blocks(original: nn.Module, tuned: nn.Module) -> int:
    """Let `tuned` take over what `original` computes in the blocks that both have in common.

    The leading blocks whose weights are equal, if what comes before them is equal too. `tuned` must
    then be called on the same images right after `original`.

    Returns:
        How many blocks run once for both towers; 0 where the tower's blocks are not known.
    """
    name, blocks = _blocks(tuned)
    if blocks is None:
        return 0
    differing = _differing(original, tuned)
    stem = [
        key
        for key in differing
        if not key.startswith((f"{name}.", *AFTER_BLOCKS)) and key not in AFTER_BLOCKS
    ]
    changed = {int(key[len(name) + 1 :].split(".")[0]) for key in differing if key.startswith(name)}
    shared = 0 if stem else min(changed, default=len(blocks))
    if shared == 0:
        return 0
    kept: list[Any] = []  # what the last shared block gave for the last images
    source = _blocks(original)[1]
    assert source is not None

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept[:] = [output]

    source[shared - 1].register_forward_hook(keep)
    for number in range(shared - 1):
        blocks[number] = _Replaced(lambda x: x)
    blocks[shared - 1] = _Replaced(lambda x: kept.pop())
    return shared


class _Replaced(nn.Module):
    """A function in the place of a block; other arguments than the first, such as masks, are ignored."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.compute(x)


def _blocks(visual: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential | None]:
    """Name and list of an image tower's blocks: of open_clip's ViT, and of timm's trunks."""
    for name in ("transformer.resblocks", "trunk.blocks", "trunk.stages"):
        found: Any = visual
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, (nn.ModuleList, nn.Sequential)):
            return name, found
    return "", None


def _differing(original: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """The tensors of `tuned` that are not equal to those of `original`."""
    before = original.state_dict()
    return {k: v for k, v in tuned.state_dict().items() if not torch.equal(v, before[k])}
