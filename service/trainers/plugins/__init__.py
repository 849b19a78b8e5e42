"""Files that trainers load by path, in a folder of their own.

ms-swift puts a plugin's folder first on `sys.path`; beside `service/trainers/trl.py` its `import trl` would find ours.
"""
