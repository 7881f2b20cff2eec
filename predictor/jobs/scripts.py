"""What happens to a job in Redis in one step, in Lua: Redis runs a script as a whole or not at all.

Keys: `job` is the job's hash, `stream` that of its model, `waiting` the set of ids that wait, `ended` the ids that have
ended, sorted by when, and `sizes` a hash of their bytes, with the sum in its field `sum`. A job is one entry of its
stream at a time, named in the hash; the entry leaves the stream when the job is done with. An idempotency key is kept
under the name that the hash's field `key` holds, and lives as long as the hash.

Each script may be sent twice, because a reply was lost: the second time it changes nothing and replies the same.
"""

from __future__ import annotations

GROUP = "workers"

# Where Redis is full only new jobs are refused: what it has accepted may end, and be removed.
_MAY_FILL = "#!lua flags=allow-oom"

# What the others begin with. `drop` takes an entry out of the group and the stream; `keep` lets an ended job
# expire, and the oldest ended ones go, but never this one.
_SHARED = f"""
local GROUP = '{GROUP}'
local function field(job, name) return redis.call('HGET', job, name) or '' end
local function drop(stream, entry)
    redis.call('XACK', stream, GROUP, entry)
    redis.call('XDEL', stream, entry)
end
local function enqueue(job, stream, waiting, id)
    local entry = redis.call('XADD', stream, '*', 'id', id)
    redis.call('HSET', job, 'status', 'queued', 'tokens', 0, 'entry', entry, 'worker', '')
    redis.call('SADD', waiting, id)
end
local function remove(job)
    if field(job, 'key') ~= '' then redis.call('DEL', field(job, 'key')) end
    redis.call('DEL', job)
end
local function uncount(ended, sizes, id)
    redis.call('ZREM', ended, id)
    redis.call('HINCRBY', sizes, 'sum', 0 - (redis.call('HGET', sizes, id) or 0)) -- -0 is no integer
    redis.call('HDEL', sizes, id)
    if redis.call('ZCARD', ended) == 0 then redis.call('DEL', sizes) end
end
local function keep(job, id, ended, sizes, seconds, most, bytes)
    redis.call('EXPIRE', job, seconds)
    if field(job, 'key') ~= '' then redis.call('EXPIRE', field(job, 'key'), seconds) end
    local time = redis.call('TIME')
    local now = time[1] + time[2] / 1e6
    local size = redis.call('HSTRLEN', job, 'body') + redis.call('HSTRLEN', job, 'result')
    redis.call('ZADD', ended, now, id)
    redis.call('HSET', sizes, id, size)
    redis.call('HINCRBY', sizes, 'sum', size)
    for _, gone in ipairs(redis.call('ZRANGEBYSCORE', ended, '-inf', now - seconds - 1)) do
        uncount(ended, sizes, gone)
    end
    local kept = redis.call('ZCARD', ended)
    while kept > 1 and (kept > tonumber(most) or tonumber(redis.call('HGET', sizes, 'sum')) > tonumber(bytes)) do
        local oldest = redis.call('ZRANGE', ended, 0, 0)[1]
        uncount(ended, sizes, oldest)
        remove(string.sub(job, 1, #job - #id) .. oldest)
        kept = kept - 1
    end
end
local function awaits_delivery(job)
    local status = field(job, 'status')
    if status ~= 'succeeded' and status ~= 'failed' then return false end
    return field(job, 'webhook') ~= '' and field(job, 'delivery') == ''
end
"""

# In what follows KEYS are job, stream, waiting, ended, sizes where nothing else is said.

# KEYS and also the idempotency key, if there is one; ARGV id, limit, the hash's fields and values.
# The id of the job that is kept, or nil past the limit.
ADD = (
    _SHARED
    + """
local job, stream, waiting, key = KEYS[1], KEYS[2], KEYS[3], KEYS[6]
local id = ARGV[1]
if redis.call('EXISTS', job) == 1 then return id end -- this very call, sent again
if key then
    local earlier = redis.call('GET', key)
    if earlier then return earlier end
end
if redis.call('SCARD', waiting) >= tonumber(ARGV[2]) then return false end
if key then redis.call('SET', key, id) end
-- The group stands before the first entry, so that whoever scales workers sees it wait.
redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
redis.call('HSET', job, 'key', key or '', unpack(ARGV, 3))
enqueue(job, stream, waiting, id)
return id
"""
)

# ARGV id, entry, worker, a name of this call, most starts, the error past them, as `keep`.
# 1 if the job is this worker's now.
BEGIN = (
    _MAY_FILL
    + _SHARED
    + """
local job, stream, waiting, ended, sizes = unpack(KEYS)
local id, entry, worker, call = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if field(job, 'entry') ~= entry then -- removed, or queued again since
    drop(stream, entry)
    return 0
end
local status = field(job, 'status')
if status == 'running' and field(job, 'call') == call then return 1 end -- this very call, sent again
if status == 'queued' or status == 'running' then
    redis.call('SREM', waiting, id)
    redis.call('HSET', job, 'worker', worker, 'call', call)
    if tonumber(field(job, 'starts')) < tonumber(ARGV[5]) then
        redis.call('HINCRBY', job, 'starts', 1)
        redis.call('HSET', job, 'status', 'running', 'tokens', 0)
        return 1
    end
    redis.call('HSET', job, 'status', 'failed', 'error', ARGV[6])
    keep(job, id, ended, sizes, unpack(ARGV, 7))
end
if awaits_delivery(job) then
    redis.call('HSET', job, 'worker', worker)
    return 1
end
drop(stream, entry)
return 0
"""
)

# ARGV worker, tokens, of. 1 if the job is still this worker's, whose claim is as new then.
RENEW = (
    _MAY_FILL
    + _SHARED
    + """
local job, stream = KEYS[1], KEYS[2]
if field(job, 'worker') ~= ARGV[1] then return 0 end
if field(job, 'status') == 'running' then
    redis.call('HSET', job, 'tokens', ARGV[2], 'of', ARGV[3])
elseif not awaits_delivery(job) then
    return 0
end
redis.call('XCLAIM', stream, GROUP, ARGV[1], 0, field(job, 'entry'), 'JUSTID') -- sets its idle time to zero
return 1
"""
)

# ARGV id, worker, as `keep` (three), the hash's fields and values.
# 1 if this end is the job's: the first one counts, whoever brings it.
FINISH = (
    _MAY_FILL
    + _SHARED
    + """
local job, stream, waiting, ended, sizes = unpack(KEYS)
local id, worker, status = ARGV[1], ARGV[2], field(job, 'status')
if (status == 'succeeded' or status == 'failed') and field(job, 'worker') == worker then return 1 end -- sent again
if status ~= 'queued' and status ~= 'running' then return 0 end
redis.call('HSET', job, 'worker', worker, unpack(ARGV, 6))
redis.call('SREM', waiting, id)
keep(job, id, ended, sizes, ARGV[3], ARGV[4], ARGV[5])
if not awaits_delivery(job) then drop(stream, field(job, 'entry')) end
return 1
"""
)

# ARGV delivery.
SETTLE = (
    _MAY_FILL
    + _SHARED
    + """
local job, stream = KEYS[1], KEYS[2]
if not awaits_delivery(job) then return 0 end
redis.call('HSET', job, 'delivery', ARGV[1])
drop(stream, field(job, 'entry'))
return 1
"""
)

# ARGV id, worker, by how much the count of starts changes.
GIVE_BACK = (
    _MAY_FILL
    + _SHARED
    + """
local job, stream, waiting = KEYS[1], KEYS[2], KEYS[3]
if field(job, 'worker') ~= ARGV[2] or field(job, 'status') ~= 'running' then return 0 end
drop(stream, field(job, 'entry'))
redis.call('HINCRBY', job, 'starts', ARGV[3])
enqueue(job, stream, waiting, ARGV[1])
return 1
"""
)

# ARGV id, 1 if the job had ended when it was read, as `keep`. Cancels one that had not, and removes one that had.
# The entry of one that waits stays until a worker reads it: Redis cannot tell the group's lag once an entry is gone
# that was not delivered, and workers are scaled by that lag.
DELETE = (
    _MAY_FILL
    + _SHARED
    + """
local job, stream, waiting, ended, sizes = unpack(KEYS)
local id, status = ARGV[1], field(job, 'status')
if ARGV[2] == '1' then
    if awaits_delivery(job) then drop(stream, field(job, 'entry')) end
    uncount(ended, sizes, id)
    remove(job)
elseif status == 'queued' or status == 'running' then
    redis.call('SREM', waiting, id)
    redis.call('HSET', job, 'status', 'cancelled')
    keep(job, id, ended, sizes, unpack(ARGV, 3))
    if status == 'running' then drop(stream, field(job, 'entry')) end
end
"""
)

# KEYS stream; ARGV worker. Forgets a worker, unless an entry is still its.
LEAVE = (
    _SHARED
    + """
if #redis.call('XPENDING', KEYS[1], GROUP, '-', '+', 1, ARGV[1]) > 0 then return 0 end
return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], GROUP, ARGV[1])
"""
)
