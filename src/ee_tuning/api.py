"""EarlyExitModel: the public class. A frozen backbone with exits that is saved, loaded, decoded."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from ee_tuning.adapter import CONFIG_NAME, save
from ee_tuning.backbone import check_merged
from ee_tuning.backbone.positions import padded_positions
from ee_tuning.decode import generate, generate_batch, load_part, warm_up
from ee_tuning.decode.arguments import read_leaving
from ee_tuning.decode.settings import POLICIES, ignored
from ee_tuning.devices import pick_device
from ee_tuning.errors import Notice, UserError
from ee_tuning.exit_config import ExitConfig
from ee_tuning.files import read_json, write_json
from ee_tuning.losses import IGNORED
from ee_tuning.model import EarlyExitOutput, Network
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.share import New, Saved, Share, load
from ee_tuning.tune_config import FrozenPrecision

# Pipelines take any model, but log an error if its class is not listed. This list is of models that
# wrap another one.
SUPPORTED_PEFT_TASKS["text-generation"].append("EarlyExitModel")


class EarlyExitModel(Network):
    """A causal LM of transformers, frozen, and its exits.

    `exits` maps ``str(layer)`` to an exit; `model` is the causal LM, `backbone` knows its parts.
    """

    @classmethod
    def from_base(
        cls,
        model: str | os.PathLike[str] | PreTrainedModel,
        config: ExitConfig,
        *,
        whole: bool = True,
        dtype: torch.dtype | str = "auto",
        device: str | int | torch.device | None = None,
        backbone_precision: FrozenPrecision = "same",
        trust_remote_code: bool = False,
    ) -> EarlyExitModel:
        """New exits on a backbone: a local folder, a hub id or a loaded model.

        whole, dtype, device, backbone_precision: see `ee_tuning.share.Share`. trust_remote_code:
        code that comes with the backbone may run.

        Raises:
            UserError: the backbone or the exits are not what this method can work with.
        """
        if not isinstance(config, ExitConfig):
            raise UserError(
                f"new exits are told by an ExitConfig, not by a {type(config).__name__}: give "
                "ExitConfig(layers=[8, 16], arch='mlp')"
            )
        place = _place(device)
        share = Share(whole=whole, dtype=dtype, device=place, precision=backbone_precision)
        return load(New(_named(model), config, trust_remote_code), share, cls)

    @classmethod
    def from_pretrained(
        cls,
        exits: str | os.PathLike[str],
        model: str | os.PathLike[str] | PreTrainedModel | None = None,
        *,
        whole: bool = True,
        dtype: torch.dtype | str = "auto",
        exit_dtype: torch.dtype | None = None,
        device: str | int | torch.device | None = None,
        backbone_precision: FrozenPrecision = "same",
        mesh: Mesh | None = None,
        stage_layers: Sequence[int] = (),
        trust_remote_code: bool = False,
    ) -> EarlyExitModel:
        """Saved exits (a folder or a hub id) on their backbone, looked up if not given.

        whole, dtype, exit_dtype, device, backbone_precision: see `ee_tuning.share.Share`. mesh,
        stage_layers: what this process of several needs to decode with the others; see
        `ee_tuning.decode.load_part`. trust_remote_code: code that comes with the backbone may run.

        Raises:
            UserError: files missing or damaged, or exits made for another backbone.
        """
        share = Share(
            whole=whole,
            dtype=dtype,
            exit_dtype=exit_dtype,
            device=_place(device),
            precision=backbone_precision,
        )
        source = Saved(_named(exits), _named(model), trust_remote_code)
        if mesh is not None:
            return load_part(source, share, cls, mesh, stage_layers)
        return load(source, share, cls)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> EarlyExitOutput:
        """Losses and logits of every exit; see `Network.forward`, and its other arguments there.

        Names and order of the arguments are those of transformers. attention_mask: (B, T), 0 where
        shorter texts are padded, on either side: there is no loss of what stands there.

        Raises:
            UserError: a mask or labels that are of something else, or a mask beside position_ids;
                or an adapter of PEFT was put into the backbone.
        """
        check_merged(self.model)
        if labels is not None and labels.shape != input_ids.shape:
            raise UserError(
                f"labels of shape {tuple(labels.shape)} are not of input_ids of shape "
                f"{tuple(input_ids.shape)}: give one for each token, as a copy of input_ids is"
            )
        if attention_mask is not None:
            if position_ids is not None:
                raise UserError("both attention_mask and position_ids are given: leave one out")
            position_ids = padded_positions(attention_mask, input_ids.shape)
            if labels is not None:  # a first token would be what padding predicts
                unasked = (attention_mask == 0) | (position_ids == 0)
                labels = labels.masked_fill(unasked, IGNORED)
        return super().forward(input_ids, labels=labels, position_ids=position_ids, **kwargs)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``exits.safetensors``, ``exit_config.json`` and a model card.

        dtype: what to store the weights in; default: as they are.
        """
        save(self, folder, dtype)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the exits to the hub; gives the address of the repository."""
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        folder = tempfile.mkdtemp()
        try:
            self.save_pretrained(folder)
            saved = read_json(Path(folder) / CONFIG_NAME) | {"base_model_path": None}
            write_json(Path(folder) / CONFIG_NAME, saved)  # nobody else has it there
            api.upload_folder(repo_id=url.repo_id, folder_path=folder)
        finally:
            shutil.rmtree(folder)
        return str(url)

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """Generate from prompts (B, P), `inputs` or ``input_ids``; see `ee_tuning.decode.generate`.

        Names and order of the arguments are those of transformers. Settings that the mode ignores
        are named in a warning.
        """
        leaving = read_leaving(kwargs.pop("leaving", None), kwargs)
        if leaving.mode in POLICIES and (unused := ignored(leaving)):
            warnings.warn(unused, Notice, stacklevel=2)
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise UserError("both inputs and input_ids are given: leave one out")
        input_ids = kwargs.pop("input_ids", inputs)
        return generate(self, input_ids, leaving, generation_config=generation_config, **kwargs)

    def generate_batch(self, prompts: Iterable[Any], **kwargs: Any) -> Iterator[tuple[int, Any]]:
        """Generate from any number of prompts; see `ee_tuning.decode.generate_batch`."""
        return generate_batch(self, prompts, **kwargs)

    def warm_up(self, **kwargs: Any) -> float:
        """Compile decoding ahead; see `ee_tuning.decode.warm_up`."""
        return warm_up(self, **kwargs)

    # What transformers' pipelines ask a model for, besides `device`, `dtype` and `config`.

    @property
    def generation_config(self) -> Any:
        """The backbone's."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        """Give the backbone another one."""
        self.model.generation_config = config

    def can_generate(self) -> bool:
        """Yes."""
        return True


def _named(given: Any) -> Any:
    """A path as its name; a hub id or a model as it is."""
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _place(device: str | int | torch.device | None) -> torch.device | None:
    """A device as torch has it.

    Raises:
        UserError: it is none, or not there.
    """
    if device is None:
        return None
    return pick_device(f"cuda:{device}" if isinstance(device, int) else str(device))
