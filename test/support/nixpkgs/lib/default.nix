# The part of nixpkgs' lib that nix/ uses, and no more of each function than it uses, for where there is no nixpkgs. What
# the real one would refuse must not pass here: types are checked, options must exist, defaults give way.
let
  inherit (builtins)
    all
    attrNames
    concatLists
    concatMap
    elemAt
    filter
    foldl'
    head
    isAttrs
    isBool
    isFunction
    isInt
    isList
    isPath
    isString
    length
    listToAttrs
    mapAttrs
    substring
    tail
    ;
  fails = at: what: throw "${builtins.concatStringsSep "." at}: ${what}";
  is = kind: value: isAttrs value && value._type or null == kind;
  nub =
    names:
    attrNames (
      listToAttrs (
        map (name: {
          inherit name;
          value = null;
        }) names
      )
    );

  # Definitions with their mkIf, mkDefault, mkForce and mkAfter taken off; only those of the lowest number, as in nixpkgs.
  settle =
    definitions:
    let
      open =
        priority: value:
        if is "if" value then
          if value.condition then open priority value.content else [ ]
        else if is "override" value then
          open value.priority value.content
        else if is "after" value then
          map (d: d // { after = true; }) (open priority value.content)
        else
          [ { inherit priority value; } ];
      found = concatMap (open 100) definitions;
      lowest = foldl' (a: b: if b.priority < a then b.priority else a) 1500 found;
    in
    map (d: d.value) (
      filter (d: d.priority == lowest) (filter (d: !d ? after) found ++ filter (d: d ? after) found)
    );

  # A condition on a set is one on each of its members, so that nobody needs it before it is known.
  members =
    value:
    if is "if" value then mapAttrs (_: lib.mkIf value.condition) (members value.content) else value;

  # What all definitions say of one member.
  under = name: concatMap (d: if members d ? ${name} then [ (members d).${name} ] else [ ]);

  merge =
    at: option: definitions:
    let
      default = if option ? default then [ (lib.mkOverride 1500 option.default) ] else [ ];
      settled = settle (definitions ++ default);
    in
    if settled != [ ] then option.type.merge at settled else fails at "used, but not defined";

  # A tree of options; what none of them is goes to `freeform`, if there is that.
  build =
    freeform: at: options: definitions:
    let
      build' =
        name:
        let
          below = at ++ [ name ];
        in
        if !options ? ${name} then
          if freeform == null then
            fails below "no such option"
          else
            freeform.merge below (settle (under name definitions))
        else if is "option" options.${name} then
          merge below options.${name} (under name definitions)
        else
          build freeform below options.${name} (under name definitions);
      # Of what is no option, only what a condition leaves.
      defined = filter (name: options ? ${name} || settle (under name definitions) != [ ]);
      names = nub (attrNames options ++ defined (concatMap (d: attrNames (members d)) definitions));
      value = listToAttrs (
        map (name: {
          inherit name;
          value = build' name;
        }) names
      );
      unknown = filter (name: !options ? ${name}) names;
    in
    # Unused, they would never be looked at.
    if freeform == null && unknown != [ ] then build' (head unknown) else value;

  # A type says which values it takes, and makes one of all that settle leaves of an option.
  one = what: check: {
    inherit check;
    merge =
      at: values:
      if !all check values then
        fails at "not ${what}"
      else if all (value: value == head values) values then
        head values
      else
        fails at "defined twice";
  };
  many = what: check: merge: {
    inherit check;
    merge = at: values: if !all check values then fails at "not ${what}" else merge at values;
  };

  lib = {
    mkOption = option: option // { _type = "option"; };
    mkEnableOption =
      _:
      lib.mkOption {
        type = lib.types.bool;
        default = false;
      };
    mkIf = condition: content: {
      _type = "if";
      inherit condition content;
    };
    mkAfter = content: {
      _type = "after";
      inherit content;
    };
    mkDefault = lib.mkOverride 1000;
    mkForce = lib.mkOverride 50;
    mkOverride = priority: content: {
      _type = "override";
      inherit priority content;
    };
    literalExpression = text: text;
    literalMD = text: text;
    mkPackageOption =
      packages: name:
      { }:
      lib.mkOption {
        type = lib.types.package;
        default = packages.${name};
      };

    types = {
      bool = one "a boolean" isBool;
      int = one "an integer" isInt;
      ints.unsigned = one "an integer, 0 or more" (value: isInt value && value >= 0);
      ints.between =
        low: high:
        one "an integer from ${toString low} to ${toString high}" (
          value: isInt value && value >= low && value <= high
        );
      ints.positive = one "an integer above 0" (value: isInt value && value > 0);
      str = one "a string" isString;
      strMatching =
        pattern:
        one "a string of that form" (value: isString value && builtins.match pattern value != null);
      path = one "an absolute path" (value: isPath value || isString value && substring 0 1 value == "/");
      enum = values: one "one of those" (value: builtins.elem value values);
      package = one "a package" (value: value.type or null == "derivation");
      nullOr =
        type:
        many "null or that" (value: value == null || type.check value) (
          at: values: if all (value: value == null) values then null else type.merge at values
        );
      either =
        a: b:
        many "one of the two" (value: a.check value || b.check value) (
          at: values: if all a.check values then a.merge at values else b.merge at values
        );
      oneOf = types: foldl' lib.types.either (head types) (tail types);
      listOf =
        type:
        many "a list" (value: isList value && all type.check value) (
          at: values: map (value: type.merge at [ value ]) (concatLists values)
        );
      attrsOf =
        type:
        many "a set" isAttrs (
          at: values:
          let
            names = filter (name: settle (under name values) != [ ]) (
              concatMap (d: attrNames (members d)) values
            );
          in
          mapAttrs (name: _: type.merge (at ++ [ name ]) (settle (under name values))) (
            listToAttrs (
              map (name: {
                inherit name;
                value = null;
              }) names
            )
          )
        );
      anything = many "anything" (_: true) (
        at: values:
        if all (value: isAttrs value && value.type or null != "derivation") values then
          (lib.types.attrsOf lib.types.anything).merge at values
        else if length values == 1 then
          head values
        else if all isList values then
          concatLists values
        else
          (one "anything" (_: true)).merge at values
      );
      submodule =
        {
          freeformType ? null,
          options,
        }:
        many "a set" isAttrs (at: values: build freeformType at options values);
    };

    # With `freeform`, what is no option is a value of that type.
    evalModules =
      {
        modules,
        specialArgs,
        freeform ? null,
      }:
      let
        called =
          module: if isFunction module then module (specialArgs // { inherit config lib; }) else module;
        flat =
          module:
          let
            part = called (if isPath module then import module else module);
            key = if isPath module then toString module else null;
          in
          concatMap flat (part.imports or [ ]) ++ [ { inherit key part; } ];
        found = concatMap flat modules;
        # A file that is named twice counts once.
        files = listToAttrs (
          map ({ key, part }: {
            name = key;
            value = part;
          }) (filter ({ key, ... }: key != null) found)
        );
        parts =
          builtins.attrValues files ++ map ({ part, ... }: part) (filter ({ key, ... }: key == null) found);
        merged =
          at: a: b:
          let
            both =
              name: value:
              if !a ? ${name} then
                value
              else if is "option" value || is "option" a.${name} then
                fails (at ++ [ name ]) "already declared"
              else
                merged (at ++ [ name ]) a.${name} value;
          in
          a // mapAttrs both b;
        options = foldl' (merged [ ]) { } (map (part: part.options or { }) parts);
        config = build freeform [ ] options (
          map (
            part: if part ? config || part ? options then part.config or { } else removeAttrs part [ "imports" ]
          ) parts
        );
      in
      {
        inherit config options;
      };

    assertMsg = condition: message: condition || throw message;
    fileset.toSource =
      { root, fileset }: if all builtins.pathExists fileset then root else throw "no such file";
    fileset.difference = a: _: [ a ];
    fileset.maybeMissing = file: file;
    fileset.unions = files: files;
    filterAttrs =
      keep: set: listToAttrs (filter ({ name, value }: keep name value) (lib.attrsToList set));
    attrsToList =
      set:
      map (name: {
        inherit name;
        value = set.${name};
      }) (attrNames set);
    importTOML = file: builtins.fromTOML (builtins.readFile file);
    inherit concatMap mapAttrs;
    recursiveUpdate =
      a: b:
      if isAttrs a && isAttrs b then
        a // mapAttrs (name: value: if a ? ${name} then lib.recursiveUpdate a.${name} value else value) b
      else
        b;
    genAttrs =
      names: f:
      listToAttrs (
        map (name: {
          inherit name;
          value = f name;
        }) names
      );
    escapeShellArg = text: "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] text}'";
    escapeShellArgs = texts: builtins.concatStringsSep " " (map lib.escapeShellArg texts);
    mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
    licenses.mit = "MIT";
    optional = condition: one: if condition then [ one ] else [ ];
    optionalString = condition: text: if condition then text else "";
    getExe = package: "${package}/bin/${package.meta.mainProgram}";
    getExe' = package: name: "${package}/bin/${name}";
    last = list: elemAt list (length list - 1);
    platforms.linux = [ "linux" ];
    platforms.unix = [
      "linux"
      "darwin"
    ];
    removePrefix =
      prefix: text:
      let
        size = builtins.stringLength prefix;
      in
      if substring 0 size text == prefix then substring size (-1) text else text;
    toInt = builtins.fromJSON;
    toList = value: if isList value then value else [ value ];
    filterAttrsRecursive =
      keep: set:
      listToAttrs (
        concatMap (
          name:
          if !keep name set.${name} then
            [ ]
          else
            [
              {
                inherit name;
                value = if isAttrs set.${name} then lib.filterAttrsRecursive keep set.${name} else set.${name};
              }
            ]
        ) (attrNames set)
      );
  };
in
lib
