"""Hugging Face's own server (`transformers serve`) with a Qwen2.5-VL: python serve.py MODEL PORT [FILE, which receives what was asked].

The server loads processors with `AutoProcessor`, which needs torchvision for this family; ours does without. Nothing else is changed."""
import json, sys
import transformers
from transformers.cli.serve import Serve
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from readl_nb.models import load_processor

def main(model, port, log=None):
    transformers.AutoProcessor.from_pretrained = lambda path, **options: load_processor(path)
    answer = ChatCompletionHandler.handle_request
    async def noted(self, body, request_id):
        if log: open(log, 'a').write(json.dumps(body) + '\n')
        return await answer(self, body, request_id)
    ChatCompletionHandler.handle_request = noted
    Serve(force_model=model, host='127.0.0.1', port=int(port), device='cpu', dtype='float32')

main(*sys.argv[1:])
