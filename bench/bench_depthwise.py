"""A training step of a network with depthwise convolutions under bf16 autocast on the CPU:
plain autocast against `pymcip.model.depthwise`, which computes their weight gradient in fp32.
"""

from __future__ import annotations

import timm
import torch
from harness import Report, Rival, common_arguments, compare

from pymcip.model.depthwise import speed_up_depthwise


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="a timm model")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=160)
    options = parser.parse_args()
    torch.manual_seed(0)
    size = (options.batch_size, 3, options.image_size, options.image_size)
    pixels = torch.randn(size).contiguous(memory_format=torch.channels_last)
    reference = timm.create_model(options.model, num_classes=64).train()
    weights = {name: value.clone() for name, value in reference.state_dict().items()}

    def rival(name: str, changed: bool) -> Rival:
        model = timm.create_model(options.model, num_classes=64).train()
        model.load_state_dict(weights)
        model.to(memory_format=torch.channels_last)
        if changed:
            speed_up_depthwise(model)

        def step() -> float:
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(pixels).float().square().mean()
            loss.backward()
            return float(loss.detach())

        return Rival(name, step, float)

    rivals = [rival("autocast", False), rival("fp32 weight gradient", True)]
    timings = compare(rivals, repetitions=options.repetitions)
    report = Report("depthwise", device="cpu", dtype="bfloat16", store=options.store)
    case = {"model": options.model, "batch": options.batch_size, "size": options.image_size}
    report.add(case, timings, work=options.batch_size, unit="images", accuracy="loss")
    report.finish()


if __name__ == "__main__":
    main()
