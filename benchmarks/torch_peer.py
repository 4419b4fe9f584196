"""PyTorch beside us: diffusers' static DiT of the same size, and a training step of it.

PyTorch and diffusers are imported when they are asked for: the benchmarks run without them.
"""

from dydit_jax.convert.diffusers_layout import transformer_config

LEARNING_RATE, EMA_WEIGHT, CLIP_NORM = 1e-4, 1e-4, 1.0


def make_network(config):
    """Return diffusers' static DiT.

    Args:
      config: a `DiTConfig`; its routers do not count.
    """
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_config(transformer_config(config))


def share_embeddings(network) -> None:
    """Let all blocks have the embeddings of the first, as in DiT; diffusers gives each block a copy to train."""
    first, *others = network.transformer_blocks
    for block in others:
        block.norm1.emb = first.norm1.emb


def make_training_step(network, forward, config, batch: int):
    """Return a function that takes a training step: clipping, AdamW, and an average of the weights.

    On a GPU products are bfloat16, on a CPU float32. The loss is the error of the noise alone.

    Args:
      network: whose parameters are trained, on its device.
      forward: the network, or what `torch.compile` made of it.
      config: as for `make_network`.
      batch: images of a step.
    """
    import torch

    network.train()
    parameters = list(network.parameters())
    device = parameters[0].device.type
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    x = torch.randn(batch, config.channels, config.side, config.side, device=device)
    labels = torch.arange(batch, device=device) % config.classes

    def step():
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (batch,), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = forward(0.7 * x + 0.7 * noise, t, labels).sample
        loss = (output[:, : config.channels].float() - noise).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, EMA_WEIGHT)

    return step
