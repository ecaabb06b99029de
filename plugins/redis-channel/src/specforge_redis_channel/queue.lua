-- The queue of capture work: the same book as specforge_core.channel.queue_book, with members that show life.
-- A call whose reply was lost is made again under the same request, which is kept until that caller's next such call.
local QUEUE = base .. ':queue'        -- hash: identity, number, session, position, committed, order (of offers); ending, while ended
local MEMBERS = base .. ':members'    -- hash: name -> session of its last process, '' once that left
local LAST = base .. ':last'          -- hash: call, and by whom -> request of the last one, and what came of it
local ENTRIES = base .. ':entries'    -- hash: batch -> 'order attempt json' while it is outstanding
local RETURNED = base .. ':returned'  -- list: batches that came back and are free
local OFFERED = base .. ':offered'    -- list: batches that were never taken
local LEASES = base .. ':leases'      -- hash: batch -> 'number worker' while it is held
local RESULTS = base .. ':results'    -- list: 'position number batch json', from the first that is not committed
local FINISHED = base .. ':finished'  -- hash: batch -> how many of the results are of it
local MOST_RESULTS, MOST_BYTES, RESULTS_PER_LOOK = 256, 1048576, 32  -- of one reply
local FIRST_BATCH = 7                 -- where batches begin in ARGV: more than a function takes

-- A count as decimal digits; Lua would write large ones with an exponent.
local function digits(number)
  return string.format('%.0f', number)
end

local function count(hash, field)
  local value = redis.call('HGET', hash, field) or '0'
  if #value > 16 or not string.match(value, '^%d+$') then damaged(hash) end
  return tonumber(value)
end

local function entry_of(key, list)
  local order, attempt, json = string.match(redis.call('HGET', ENTRIES, key) or '', '^(%d+) (%d+) (.*)$')
  if not order or #attempt > 15 then damaged(list or ENTRIES) end
  return order, tonumber(attempt), json
end

local function add(key, json)
  if redis.call('HEXISTS', ENTRIES, key) == 1 then return end
  local order = digits(count(QUEUE, 'order') + 1)
  redis.call('HSET', QUEUE, 'order', order)
  redis.call('HSET', ENTRIES, key, order .. ' 0 ' .. json)
  redis.call('RPUSH', OFFERED, key)
end

local function has_ended()
  return redis.call('HEXISTS', QUEUE, 'ending') == 1
end

local function is_held(key, number, worker)
  return redis.call('HGET', LEASES, key) == number .. ' ' .. worker
end

-- The last position, and up to which results are forgotten.
local function positions()
  local position, committed = count(QUEUE, 'position'), count(QUEUE, 'committed')
  if position - committed ~= redis.call('LLEN', RESULTS) then damaged(RESULTS) end
  return position, committed
end

-- A worker is gone: its batches come back in the order they were taken; the attempts count.
local function drop(worker)
  local lost, held = {}, redis.call('HGETALL', LEASES)
  for i = 1, #held, 2 do
    local number, holder = string.match(held[i + 1], '^(%d+) (.*)$')
    if not number then damaged(LEASES) end
    if holder == worker then table.insert(lost, {tonumber(number), held[i]}) end
  end
  table.sort(lost, function(a, b) return a[1] < b[1] end)
  for _, lease in ipairs(lost) do
    redis.call('HDEL', LEASES, lease[2])
    redis.call('RPUSH', RETURNED, lease[2])
  end
end

-- Members whose heartbeat ended are dropped, in the order in which it did.
local function drop_dead()
  if not JUDGE then return end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', ALIVE, '(' .. digits(NOW + TTL), '+inf')) do
    beat(member)  -- this clock went back: it would live for so much longer
  end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', ALIVE, '-inf', NOW)) do
    if string.sub(member, 1, 2) == 'm:' then
      redis.call('ZREM', ALIVE, member)
      drop(string.sub(member, 3))
    end
  end
end

-- Whether the name is this process's. A member that was dropped, or that a server which lost everything forgot, is one
-- again; a member that left is not, whatever arrives late.
local function know_member(name, session)
  local known = redis.call('HGET', MEMBERS, name)
  if not known then redis.call('HSET', MEMBERS, name, session) end
  return (known or session) == session
end

function operations.join(name, session)
  even_if_full()
  local member = 'm:' .. name
  if redis.call('HGET', MEMBERS, name) ~= session then
    if lives(member) then return {'busy', redis.call('ZSCORE', ALIVE, member)} end
    drop(name)
    redis.call('HSET', MEMBERS, name, session)
  end
  beat(member)
  return {'ok'}
end

function operations.leave(name, session)
  even_if_full()
  if know_member(name, session) then
    redis.call('HSET', MEMBERS, name, '')
    redis.call('ZREM', ALIVE, 'm:' .. name)
    drop(name)
  end
  return {'ok'}
end

-- 'm', name and session of everybody who lives in the calling process.
function operations.beat()
  even_if_full()
  for i = 4, #ARGV, 3 do
    if know_member(ARGV[i + 1], ARGV[i + 2]) then beat('m:' .. ARGV[i + 1]) end
  end
  return {'ok'}
end

-- session: that the first part of a long offer was made in; '' of the first part.
function operations.offer(request, session, above)
  local last, made_in = string.match(redis.call('HGET', LAST, 'offer') or '', '^(%S+) (%d+)$')
  if last == request then return {'ok', made_in} end
  local open = digits(count(QUEUE, 'session'))
  if session == '' then
    if open == '0' or has_ended() then
      open = digits(count(QUEUE, 'session') + 1)
      redis.call('HSET', QUEUE, 'session', open)
      redis.call('HDEL', QUEUE, 'ending')
    end
    if tonumber(above) > count(QUEUE, 'number') then redis.call('HSET', QUEUE, 'number', above) end
  elseif session ~= open or has_ended() then
    return {'ok', session}  -- the end withdraws the whole offer
  end
  for i = FIRST_BATCH, #ARGV, 2 do
    if redis.call('HEXISTS', FINISHED, ARGV[i]) == 0 then add(ARGV[i], ARGV[i + 1]) end
  end
  redis.call('HSET', LAST, 'offer', request .. ' ' .. open)
  return {'ok', open}
end

function operations.take(worker, session, request)
  even_if_full()
  local member, asked = 'm:' .. worker, 'take ' .. worker
  if stood_still(member) then return {'lapsed'} end
  if not know_member(worker, session) then return {'replaced'} end
  if not lives(member) then beat(member) end
  drop_dead()
  local last, number, key = string.match(redis.call('HGET', LAST, asked) or '', '^(%S+) (%d+) (.*)$')
  if last ~= request or not is_held(key, number, worker) then
    local list = redis.call('EXISTS', RETURNED) == 1 and RETURNED or OFFERED
    key = redis.call('LINDEX', list, 0)
    if not key then return {has_ended() and 'ended' or 'none'} end
    local order, attempt, json = entry_of(key, list)
    number = digits(count(QUEUE, 'number') + 1)
    redis.call('LPOP', list)
    redis.call('HSET', QUEUE, 'number', number)
    redis.call('HSET', ENTRIES, key, order .. ' ' .. digits(attempt + 1) .. ' ' .. json)
    redis.call('HSET', LEASES, key, number .. ' ' .. worker)
    redis.call('HSET', LAST, asked, request .. ' ' .. number .. ' ' .. key)
  end
  local _, attempt, json = entry_of(key)
  return {'lease', key, json, number, digits(attempt), digits(count(QUEUE, 'session'))}
end

function operations.finish(key, number, worker, request, json)
  local asked = 'finish ' .. worker
  if redis.call('HGET', LAST, asked) == request then return {'ok'} end
  if not is_held(key, number, worker) then return {'lost'} end
  local position, finished = digits(positions() + 1), count(FINISHED, key) + 1
  -- First, so that a full server refuses it while nothing is changed.
  redis.call('RPUSH', RESULTS, position .. ' ' .. number .. ' ' .. key .. ' ' .. json)
  redis.call('HSET', QUEUE, 'position', position)
  redis.call('HSET', FINISHED, key, digits(finished))
  redis.call('HDEL', LEASES, key)
  redis.call('HDEL', ENTRIES, key)
  redis.call('HSET', LAST, asked, request)
  return {'ok'}
end

function operations.give_back(key, number, worker)
  if not is_held(key, number, worker) then return {'ok'} end
  even_if_full()
  local order, attempt, json = entry_of(key)
  redis.call('HDEL', LEASES, key)
  if #ARGV < FIRST_BATCH then
    redis.call('HSET', ENTRIES, key, order .. ' ' .. digits(attempt - 1) .. ' ' .. json)
    redis.call('RPUSH', RETURNED, key)
    return {'ok'}
  end
  redis.call('HDEL', ENTRIES, key)
  for i = FIRST_BATCH, #ARGV, 2 do add(ARGV[i], ARGV[i + 1]) end
  return {'ok'}
end

function operations.outstanding()
  return {'ok', redis.call('HGETALL', ENTRIES)}
end

-- witness: a member of the calling process, whose heartbeat tells whether this server stood still; '' for none.
function operations.results(after, witness, identity)
  even_if_full()
  if witness ~= '' and stood_still('m:' .. witness) then return {'lapsed'} end
  drop_dead()
  local position, committed = positions()
  local first = math.max(tonumber(after), committed) + 1
  local found, nbytes = {}, 0
  while first + #found <= position and #found < MOST_RESULTS and nbytes < MOST_BYTES do
    local from = first + #found - committed - 1
    for _, record in ipairs(redis.call('LRANGE', RESULTS, from, from + RESULTS_PER_LOOK - 1)) do
      nbytes = nbytes + #record
      table.insert(found, record)
    end
  end
  local session, ending = digits(count(QUEUE, 'session')), redis.call('HGET', QUEUE, 'ending') or ''
  local alive = redis.call('ZRANGE', ALIVE, 0, -1)
  redis.call('HSETNX', QUEUE, 'identity', identity)  -- a server that lost everything gets another
  local known = redis.call('HGET', QUEUE, 'identity')
  return {'ok', digits(first), found, alive, session, ending, digits(redis.call('HLEN', ENTRIES)), known}
end

function operations.commit(position)
  even_if_full()
  local last, committed = positions()
  for forgotten = committed + 1, math.min(tonumber(position), last) do
    local key = string.match(redis.call('LINDEX', RESULTS, 0), '^%d+ %d+ (%S+) ')
    if not key then damaged(RESULTS) end
    local left = count(FINISHED, key) - 1
    redis.call('LPOP', RESULTS)
    redis.call('HSET', QUEUE, 'committed', digits(forgotten))
    if left > 0 then redis.call('HSET', FINISHED, key, digits(left)) else redis.call('HDEL', FINISHED, key) end
  end
  return {'ok'}
end

-- 'end' is a word of the language.
operations['end'] = function(session, request, ending)
  even_if_full()
  if redis.call('HGET', LAST, 'end') == request then return {'ok'} end
  if has_ended() or session ~= digits(count(QUEUE, 'session')) then return {'not_open'} end
  redis.call('UNLINK', ENTRIES, RETURNED, OFFERED, LEASES)
  redis.call('HSET', QUEUE, 'ending', ending)
  redis.call('HSET', LAST, 'end', request)
  return {'ok'}
end

return operations[ARGV[1]](unpack(ARGV, 4, 8))
