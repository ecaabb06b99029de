-- Writers, the reader, and the refs between them.

-- The last sequence number of a writer, which is made known again to a server that lost everything.
-- nil: another process writes under this name now.
local function sequence_of(name, session)
  local known = redis.call('HGET', WRITERS, name)
  if not known then return 0 end
  local owner, last = string.match(known, '^(%S+) (%d+)$')
  if not owner then damaged(WRITERS) end
  if owner ~= session then return nil end
  return tonumber(last)
end

local function know_writer(name, session)
  if redis.call('HSETNX', WRITERS, name, session .. ' 0') == 1 then redis.call('SADD', OPEN, name) end
  if redis.call('SISMEMBER', OPEN, name) == 1 and redis.call('HEXISTS', FAILED, name) == 0 then beat('w:' .. name) end
end

local function make_group()
  redis.pcall('XGROUP', 'CREATE', REFS, GROUP, '0', 'MKSTREAM')
end

-- false: another reader took over.
local function know_reader(session)
  local reader = redis.call('HGET', META, 'reader')
  if reader then return reader == session end
  redis.call('HSET', META, 'reader', session, 'reader_open', '1')
  make_group()
  beat('r:' .. session)
  return true
end

local function close_writer(name)
  redis.call('SREM', OPEN, name)
  redis.call('SREM', SEALED, name)
  redis.call('HDEL', FAILED, name)
  redis.call('ZREM', ALIVE, 'w:' .. name)
end

-- A failure counts for those who opened before it.
local function reason_since(text, since)
  local number, reason = string.match(text, '^(%d+) (.*)$')
  if not number then damaged(FAILED) end
  if tonumber(number) > tonumber(since) then return reason end
end

local function reader_failure(since)
  local text = redis.call('HGET', META, 'reader_failure')
  return text and reason_since(text, since)
end

-- The number of the last failure. Counted from the time, so that a server that lost everything does not use one again.
local function failures()
  redis.call('HSETNX', META, 'failures', NOW)
  return redis.call('HGET', META, 'failures')
end

local function new_failure(reason)
  failures()
  return redis.call('HINCRBY', META, 'failures', 1) .. ' ' .. reason
end

-- 'none', 'open', 'sealed', or 'abandoned' and by whom.
local function state_of_writers()
  local living, gone = false, nil
  for _, name in ipairs(redis.call('SMEMBERS', OPEN)) do
    if not ended(name) then
      living = true
    elseif redis.call('SISMEMBER', SEALED, name) == 1 then
      close_writer(name)
    else
      gone = gone or name
    end
  end
  if living then return 'open', '' end
  if gone then return 'abandoned', gone end
  return redis.call('EXISTS', WRITERS) == 1 and 'sealed' or 'none', ''
end

function operations.attach(proof, format)
  even_if_full()
  redis.call('HSETNX', META, 'guard', proof)
  redis.call('HSETNX', META, 'format', format)
  if redis.call('HGET', META, 'guard') ~= proof then return {'denied'} end
  return {'ok', redis.call('HGET', META, 'format')}
end

-- kind, name, session of everybody who lives in the calling process.
function operations.beat(...)
  even_if_full()
  local members = {...}
  for i = 1, #members, 3 do
    local kind, name, session = members[i], members[i + 1], members[i + 2]
    if kind == 'w' and sequence_of(name, session) then know_writer(name, session) end
    if kind == 'r' and know_reader(session) then beat('r:' .. session) end
  end
  return {'ok'}
end

function operations.open_writer(name, session)
  local member = 'w:' .. name
  if redis.call('SISMEMBER', OPEN, name) == 1 and redis.call('HEXISTS', FAILED, name) == 0 and lives(member) then
    return {'busy', redis.call('ZSCORE', ALIVE, member)}
  end
  redis.call('HSET', WRITERS, name, session .. ' 0')
  close_writer(name)
  redis.call('SADD', OPEN, name)
  beat(member)
  local reader = redis.call('HGET', META, 'reader')
  return {'ok', failures(), reader and not lives('r:' .. reader) and reader or ''}
end

-- sequence: of this batch; a batch whose reply was lost is sent again and found to be there.
function operations.publish(name, session, since, sequence, refs, nbytes, ...)
  local last = sequence_of(name, session)
  if not last then return {'replaced'} end
  local failure = reader_failure(since)
  if failure then return {'failed', failure} end
  if last < tonumber(sequence) then
    local fields, id = {...}, nil
    for i = 1, #fields, 2 do
      id = redis.call('XADD', REFS, '*', 'w', name, 'l', fields[i], 'r', fields[i + 1])
    end
    know_writer(name, session)
    redis.call('HSET', WRITERS, name, session .. ' ' .. sequence)
    redis.call('HINCRBY', META, 'refs', refs)
    redis.call('HINCRBY', META, 'bytes', nbytes)
    if id then redis.call('HSET', META, 'last', id) end
  end
  return {'ok'}
end

function operations.in_flight(name, session, since)
  if stood_still('w:' .. name) then return {'lapsed'} end
  if not sequence_of(name, session) then return {'replaced'} end
  local failure = reader_failure(since)
  if failure then return {'failed', failure} end
  local found = redis.call('HMGET', META, 'refs', 'bytes', 'reader', 'reader_open')
  local reader = 'none'
  if found[3] then reader = found[4] == '0' and 'closed' or (JUDGE and not lives('r:' .. found[3])) and 'dead' or 'alive' end
  return {'ok', found[1] or '0', found[2] or '0', reader, found[3] or ''}
end

function operations.end_writer(name, session, how, reason)
  even_if_full()
  if not sequence_of(name, session) then return {'replaced'} end
  redis.call('HSETNX', WRITERS, name, session .. ' 0')
  close_writer(name)
  if how == 'failed' then
    redis.call('SADD', OPEN, name)
    redis.call('HSET', FAILED, name, new_failure(reason))
  end
  return {'ok'}
end

function operations.seal()
  even_if_full()
  for _, name in ipairs(redis.call('SMEMBERS', OPEN)) do
    if redis.call('HEXISTS', FAILED, name) == 1 then
      close_writer(name)
    else
      redis.call('SADD', SEALED, name)
    end
  end
  return {'ok'}
end

function operations.open_reader(session)
  even_if_full()
  local found = redis.call('HMGET', META, 'reader', 'reader_open')
  local member = found[1] and 'r:' .. found[1]
  if member and found[2] == '1' and lives(member) then return {'busy', redis.call('ZSCORE', ALIVE, member)} end
  if member then redis.call('ZREM', ALIVE, member) end
  redis.call('HSET', META, 'reader', session, 'reader_open', '1')
  redis.call('HDEL', META, 'reader_failure')
  make_group()
  beat('r:' .. session)
  return {'ok', failures()}
end

-- New entries, at most count, and the state of the writers; a failure comes first.
function operations.poll(session, since, count)
  even_if_full()
  if not know_reader(session) then return {'replaced'} end
  if stood_still('r:' .. session) then return {'lapsed'} end
  if redis.call('EXISTS', FAILED) == 1 then
    local failed = redis.call('HGETALL', FAILED)
    for i = 1, #failed, 2 do
      local reason = reason_since(failed[i + 1], since)
      if reason then return {'failed', reason, failed[i]} end
    end
  end
  local entries = {}
  if tonumber(count) > 0 then
    local read = {'XREADGROUP', 'GROUP', GROUP, 'reader', 'COUNT', count, 'STREAMS', REFS, '>'}
    local found = redis.pcall(unpack(read))
    if found and found.err then
      if not string.find(found.err, 'NOGROUP', 1, true) then return found end
      make_group()
      found = redis.call(unpack(read))
    end
    if found then
      entries = found[1][2]
      redis.call('HSET', META, 'delivered', entries[#entries][1])
    end
  end
  local state, writer = 'open', ''
  if #entries == 0 then state, writer = state_of_writers() end
  local ids = redis.call('HMGET', META, 'last', 'delivered')
  return {'ok', entries, state, writer, ids[1] == ids[2] and '1' or '0'}
end

-- Entry, refs acked of it in all, their bytes, which ones, '1' where that is all of it. Sent again, it changes nothing.
function operations.ack(session, step, ...)
  even_if_full()
  if not know_reader(session) then return {'replaced'} end
  local entries = {...}
  if #entries > 0 then redis.call('HSET', META, 'step', step) else make_group() end
  for i = 1, #entries, 5 do
    local id, refs, nbytes = entries[i], tonumber(entries[i + 1]), tonumber(entries[i + 2])
    local before = redis.call('HGET', ACKED, id) or '0 0 0'
    local refs_before, nbytes_before = string.match(before, '^(%d+) (%d+)')
    if not refs_before then damaged(ACKED) end
    if refs > tonumber(refs_before) and #redis.pcall('XPENDING', REFS, GROUP, id, id, 1) > 0 then
      redis.call('HINCRBY', META, 'refs', refs_before - refs)
      redis.call('HINCRBY', META, 'bytes', string.format('%.0f', nbytes_before - nbytes))
      if entries[i + 4] == '1' then
        redis.call('XACK', REFS, GROUP, id)
        redis.call('XDEL', REFS, id)
        redis.call('HDEL', ACKED, id)
      else
        redis.call('HSET', ACKED, id, entries[i + 1] .. ' ' .. entries[i + 2] .. ' ' .. entries[i + 3])
      end
    end
  end
  return {'ok'}
end

function operations.end_reader(session, how, reason)
  even_if_full()
  if redis.call('HGET', META, 'reader') ~= session then return {'replaced'} end
  redis.call('HSET', META, 'reader_open', '0')
  redis.call('ZREM', ALIVE, 'r:' .. session)
  if how == 'failed' then redis.call('HSET', META, 'reader_failure', new_failure(reason)) end
  return {'ok'}
end

return operations[ARGV[1]](unpack(ARGV, 4))
