"""Self-supervised training: `method` is what is learned, `loop` the algorithm, `assembly` its parts, `train` the command.

    python dinov3/train/train.py --config-file toy_cpu.yaml --output-dir OUT train.dataset_path=/folder/of/images

In Python: `from dinov3.train.train import train`.
"""
