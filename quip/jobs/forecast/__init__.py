"""What a run will take, before it is run: counts of operations and bytes, rates of this machine"""
