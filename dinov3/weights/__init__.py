"""Files of weights: which are published (`catalog`), how they are written (`formats`, `configs`), how they are opened
(`reading`), put into a module (`filling`), named (`identity`), written (`writing`) and fetched (`download`).

    opened = reading.open("model.safetensors")      # any form, by content: a path, a folder, a URL, a Hugging Face id
    model = filling.build(opened.config, opened)
"""
