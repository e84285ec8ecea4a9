"""Self-supervised training: `method` says what is learned, `train` when things happen, the rest is where weights go.

    python dinov3/train/train.py --config-file toy_cpu.yaml --output-dir OUT train.dataset_path=/folder/of/images

In Python: `from dinov3.train.train import train`.
"""
