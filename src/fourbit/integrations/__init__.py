"""fourbit in other people's pipelines: transformers and PEFT."""
