"""A diffusers pipeline without autoencoder: from prompt embeddings to pictures in the pixels they were learned in.

Written into the pipeline folder it belongs to; needs nothing but diffusers and torch:
DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder + "/pipeline.py", trust_remote_code=True)(prompt_embeds=..., ...).
diffusers runs no file of a folder without trust_remote_code, be it a local one. Say it of a folder that you trained yourself, or whose
pipeline.py you compared with this file: it runs whatever stands there.
"""
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class GenePixelPipeline(DiffusionPipeline):
    """`unet` predicts on pixels in [-1, 1]; `scheduler` is any that solves from noise to a picture."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt_embeds, negative_prompt_embeds=None, num_inference_steps=20, guidance_scale=3.0, generator=None, latents=None,
                 height=None, width=None, output_type="pil", return_dict=True):
        """prompt_embeds (N, L, W); negative_prompt_embeds (1 or N, L, W), needed for a guidance scale other than 1."""
        device, dtype = self._execution_device, self.unet.dtype
        n, side = len(prompt_embeds), self.unet.config.sample_size
        tokens = prompt_embeds.to(device, dtype)
        guided = guidance_scale != 1
        if guided:
            if negative_prompt_embeds is None:
                raise ValueError("guidance needs negative_prompt_embeds; or set guidance_scale=1")
            tokens = torch.cat([negative_prompt_embeds.to(device, dtype).expand(n, -1, -1), tokens])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (n, self.unet.config.in_channels, height or side, width or side)
        x = randn_tensor(shape, generator=generator, device=device, dtype=dtype) if latents is None else latents.to(device, dtype)
        x = x * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(x, timestep)
            predicted = self.unet(torch.cat([seen, seen]) if guided else seen, timestep, tokens, return_dict=False)[0]
            if guided:
                null, prompted = predicted.chunk(2)
                predicted = null + guidance_scale * (prompted - null)
            x = self.scheduler.step(predicted, timestep, x, return_dict=False)[0]
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)
