"""Operations worth a fast form: tensors in, tensors out, a folder for each.

A folder has the reference in torch, which says what the operation is, and a file for each faster
form (cpu.py and its C++). Its `__init__` names them in one line, as an `Operation`. A form for
another device is one more file, and one more word in that line.
"""
