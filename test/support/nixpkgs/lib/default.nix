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
    head
    isAttrs
    isBool
    isFunction
    isList
    isString
    length
    listToAttrs
    mapAttrs
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

  # Definitions with their mkIf and mkDefault taken off; defaults only where there is nothing else.
  settle =
    definitions:
    let
      open =
        default: value:
        if is "if" value then
          if value.condition then open default value.content else [ ]
        else if is "default" value then
          open true value.content
        else
          [ { inherit default value; } ];
      found = concatMap (open false) definitions;
      firm = filter (d: !d.default) found;
    in
    map (d: d.value) (if firm == [ ] then found else firm);

  # A condition on a set is one on each of its members, so that nobody needs it before it is known.
  members =
    value:
    if is "if" value then mapAttrs (_: lib.mkIf value.condition) (members value.content) else value;

  # What all definitions say of one member.
  under = name: concatMap (d: if members d ? ${name} then [ (members d).${name} ] else [ ]);

  merge =
    at: option: definitions:
    let
      settled = settle definitions;
    in
    if settled != [ ] then
      option.type at settled
    else if option ? default then
      option.default
    else
      fails at "used, but not defined";

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
            freeform below (settle (under name definitions))
        else if is "option" options.${name} then
          merge below options.${name} (under name definitions)
        else
          build freeform below options.${name} (under name definitions);
      names = nub (attrNames options ++ concatMap (d: attrNames (members d)) definitions);
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

  one =
    what: check: at: values:
    if !all check values then
      fails at "not ${what}"
    else if all (value: value == head values) values then
      head values
    else
      fails at "defined twice";

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
    mkDefault = content: {
      _type = "default";
      inherit content;
    };
    literalMD = text: text;

    # A type takes a place and at least one definition, and makes one value of them.
    types = {
      bool = one "a boolean" isBool;
      str = one "a string" isString;
      package = one "a package" (value: value.type or null == "derivation");
      nullOr =
        type: at: values:
        if all (value: value == null) values then null else type at values;
      either =
        a: b: at: values:
        if isString (head values) then a at values else b at values;
      listOf =
        type: at: values:
        if !all isList values then
          fails at "not a list"
        else
          map (value: type at [ value ]) (concatLists values);
      attrsOf =
        type: at: values:
        if !all isAttrs values then
          fails at "not a set"
        else
          mapAttrs (name: _: type (at ++ [ name ]) (settle (under name values))) (
            listToAttrs (
              map (name: {
                inherit name;
                value = null;
              }) (filter (name: settle (under name values) != [ ]) (concatMap (d: attrNames (members d)) values))
            )
          );
      anything =
        at: values:
        if all (value: isAttrs value && value.type or null != "derivation") values then
          lib.types.attrsOf lib.types.anything at values
        else if length values == 1 then
          head values
        else if all isList values then
          concatLists values
        else
          one "anything" (_: true) at values;
      submodule =
        {
          freeformType ? null,
          options,
        }:
        at: values: build freeformType at options values;
    };

    evalModules =
      { modules, specialArgs }:
      let
        called =
          module: if isFunction module then module (specialArgs // { inherit config lib; }) else module;
        parts = map called modules;
        merged =
          a: b:
          let
            both = name: value: if a ? ${name} && !is "option" value then merged a.${name} value else value;
          in
          a // mapAttrs both b;
        options = builtins.foldl' merged { } (map (part: part.options or { }) parts);
        config = build null [ ] options (
          map (part: if part ? config || part ? options then part.config or { } else part) parts
        );
      in
      {
        inherit config options;
      };

    assertMsg = condition: message: condition || throw message;
    fileset.toSource =
      { root, fileset }: if all builtins.pathExists fileset then root else throw "no such file";
    fileset.unions = files: files;
    genAttrs =
      names: f:
      listToAttrs (
        map (name: {
          inherit name;
          value = f name;
        }) names
      );
    licenses.mit = "MIT";
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
      if builtins.substring 0 size text == prefix then builtins.substring size (-1) text else text;
    toInt = builtins.fromJSON;
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
