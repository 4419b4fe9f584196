"""Every knob once, with the values of the published models; all other configs start from here.

Sections stand in the order of use. What each key means and allows is said where it is read: the dataclass of the
section. None means "not set".
"""

import ml_collections
from ml_collections import config_dict


def get_config():
    config = ml_collections.ConfigDict()

    # The network: dydit_jax/models/config.py, DiTConfig. Either a published size, or the four numbers.
    config.model = ml_collections.ConfigDict()
    config.model.size = config_dict.placeholder(str)  # "XL/2": S, B, L or XL by 2, 4 or 8
    config.model.depth = config_dict.placeholder(int)
    config.model.width = config_dict.placeholder(int)
    config.model.heads = config_dict.placeholder(int)
    config.model.patch = config_dict.placeholder(int)
    config.model.side = 32  # image side / 8 for latents
    config.model.channels = 4
    config.model.classes = 1000  # -1: the number that the data have
    config.model.mlp_ratio = 4
    config.model.routers = "none"  # none: static DiT; first_on, free: DyDiT
    config.model.positions = "sine_cosine"
    config.model.token_capacity = ()  # (0.5,): at most half of each image's tokens pass an MLP; or one share per block
    config.model.time_router = "linear"  # opens heads and groups by the timestep; "a,b": heads by a, groups by b
    config.model.token_router = "mlp"  # opens tokens by their content
    config.model.guidance_free = False  # guidance in one pass, trained by loss.guidance_free
    config.model.label_init_std = 0.02
    config.model.time_init_std = 0.02

    # What noise does to images: diffusion or flow: dydit_jax/diffusion/process.py.
    config.process = ml_collections.ConfigDict()
    config.process.name = "diffusion"

    # The schedule of a diffusion: dydit_jax/diffusion/schedules.py, DiffusionConfig. A flow has no settings.
    config.diffusion = ml_collections.ConfigDict()
    config.diffusion.schedule = "linear"
    config.diffusion.train_steps = 1000

    # Training examples: dydit_jax/data/sources.py, DataConfig.
    config.data = ml_collections.ConfigDict()
    config.data.name = "synthetic"
    config.data.path = ""
    config.data.batch_size = 256
    config.data.seed = 0
    config.data.threads = 2
    config.data.max_bad = 100
    config.data.flip = True  # mirror images half of the time; False for writing and faces
    config.data.image_key = "image"  # of a tfds dataset: names of the picture and the class in its examples
    config.data.label_key = "label"

    # Loss terms and budget: dydit_jax/diffusion/terms.py, LossConfig.
    config.loss = ml_collections.ConfigDict()
    config.loss.terms = ("mse", "vb", "budget")
    config.loss.weights = ()  # one for each term; none: 1 throughout
    # Of an image's squared error by its noise; or min_snr, for diffusion, to be sampled with trailing steps.
    config.loss.weighting = "none"
    config.loss.times = "uniform"  # how times of a flow are drawn; or logit_normal
    config.loss.logit_normal = (0.0, 1.0)
    config.loss.label_dropout = 0.1
    config.loss.guidance_free = False  # docs/guidance.md
    config.loss.complete_steps = -1  # -1: the complete pass is trained throughout
    config.loss.budget = 0.5
    config.loss.budget_weight = 2.0
    config.loss.budget_hold_steps = 100
    config.loss.budget_warmup_steps = 1000

    # AdamW: dydit_jax/training/optimizer.py, OptimizerConfig.
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-4
    config.optimizer.router_multiplier = 1.0
    config.optimizer.decay = "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.decay_steps = config_dict.placeholder(int)
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = config_dict.placeholder(float)
    config.optimizer.skip_norm = config_dict.placeholder(float)

    # The run: dydit_jax/training/update.py, TrainConfig.
    config.train = ml_collections.ConfigDict()
    config.train.steps = 400_000
    config.train.seed = 0
    config.train.ema_decay = 0.9999
    config.train.init_from = ""
    config.train.class_map = ""  # "0:207,1:360": classes of init_from that own ones start from, or a file of pairs
    config.train.new_classes = "random"  # rows of the label table for the others; or "mean"
    config.train.precision = "auto"
    config.train.remat = "auto"  # recomputed for the gradient: auto, none, dots, block
    config.train.accumulate = 1  # parts of a batch, one after the other, to save memory
    config.train.trainable = ("everything",)  # or some of "routers", "labels", "lora": docs/adapters.md
    config.train.max_skips = 100

    # Low-rank updates, where train.trainable has "lora": dydit_jax/models/lora.py, LoRAConfig.
    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.lora.targets = ("qkv", "out", "up", "down")
    config.lora.experts = 1  # more: updates that depend on the timestep

    # How images are drawn from the result unless a flag of sample.py says otherwise: dydit_jax/diffusion/samplers.py.
    config.sampling = ml_collections.ConfigDict()
    config.sampling.sampler = "ddpm"
    config.sampling.steps = "250"
    config.sampling.eta = 0.0
    config.sampling.clip = config_dict.placeholder(float)
    config.sampling.guidance = 1.5
    config.sampling.guidance_interval = config_dict.placeholder(tuple)  # (100, 700): timesteps with guidance
    config.sampling.guidance_scales = config_dict.placeholder(tuple)
    config.sampling.guided_channels = "first_three"
    config.sampling.autoencoder = ""  # "sd-vae-ft-ema" for latents
    config.sampling.searched_weights = config_dict.placeholder(tuple)  # a file of dydit-search-solver brings them

    # Devices: dydit_jax/runtime/sharding.py, MeshConfig. One of the three may be -1 and takes what is left.
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    # Saving: dydit_jax/checkpoints/runs.py, CheckpointConfig.
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_steps = 5000
    config.checkpoint.keep = 2

    # Reports: dydit_jax/runtime/tracking.py, TrackingConfig.
    config.tracking = ml_collections.ConfigDict()
    config.tracking.every_steps = 100
    config.tracking.tensorboard = False
    config.tracking.wandb_project = ""
    config.tracking.samples_every_steps = 0
    config.tracking.sample_labels = tuple(range(10))
    config.tracking.metrics_every_steps = 0  # FID of the EMA; the best checkpoint is kept
    config.tracking.metrics_reference = ""  # statistics, as of evaluate.py --save_statistics
    config.tracking.metrics_images = 10_000
    config.tracking.metrics_sampler = ""  # "" for the section sampling's
    config.tracking.metrics_steps = ""
    config.tracking.metrics_inception = "inception-2015"
    config.tracking.stall_seconds = 300.0
    config.tracking.profile = ()  # (10, 15): trace these steps

    return config
