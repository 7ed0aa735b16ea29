"""What runs on a GPU.

- `ostinato.cuda.cudnn`: torch's own operator.
- `ostinato.cuda.compiler` and `ostinato.cuda.launch`: from a kernel's text to its launch.
"""
