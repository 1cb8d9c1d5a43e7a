"""Node ThriftLoadOpticalFlow: RAFT weights as OPTICAL_FLOW, also small ones and on releases without core's loader."""

import os
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..latents.raft import build_raft

FOLDER = "optical_flow"


class ThriftLoadOpticalFlow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThriftLoadOpticalFlow",
            display_name="Thrift Load Optical Flow",
            category="FrameThrift",
            description=(
                "Loads torchvision's raft_large or raft_small from models/optical_flow/ for Latent Flow Interpolate. "
                "The same type as core's Load Optical Flow Model, which newer releases have and which takes raft_large "
                "only. Nothing is downloaded."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=_files(),
                    tooltip="A file in models/optical_flow/, such as raft_small.pth.",
                )
            ],
            outputs=[io.Custom("OPTICAL_FLOW").Output()],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path(FOLDER, model_name)
        if path is None:
            raise FileNotFoundError(
                f"model_name: {model_name} is not in models/{FOLDER}/. Put torchvision's RAFT weights there and reload."
            )
        state: dict[str, Any] = comfy.utils.load_torch_file(path, safe_load=True)
        return io.NodeOutput(
            comfy.model_patcher.ModelPatcher(
                build_raft(state), load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
            )
        )


def _files() -> list[str]:
    # Releases without core's loader do not know the folder, or only what extra_model_paths.yaml says of it.
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    known = folder_paths.supported_pt_extensions
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, *known})
    return list(folder_paths.get_filename_list(FOLDER))
